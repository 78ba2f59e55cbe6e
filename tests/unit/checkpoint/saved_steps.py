"""A run folder of saved steps, for tests of which one is found and of what may go."""

from megagpt.checkpoint.directory import (
    find_checkpoints,
    newest_sha256,
    publish,
    staging_directory,
    step_directory,
    write_latest,
)
from megagpt.checkpoint.format.manifest import MANIFEST_FILE, read_manifest


class Run:
    """Saves steps as a run does, without tensors that matter."""

    def __init__(self, root, write_checkpoint):
        self.checkpoints = root / "checkpoints"
        self.write_checkpoint = write_checkpoint
        self.previous = None
        self.line = ()
        self.num_saves = 0
        self.num_resumes = 0

    def resume(self, step):
        self.num_resumes += 1  # a step that is saved anew is another one
        self.previous = newest_sha256(self.checkpoints)
        manifest = read_manifest(step_directory(self.checkpoints, step))
        self.line = ((step, manifest.sha256), *manifest.line)

    def stage(self, step):
        written = self.write_checkpoint(
            self.checkpoints / "elsewhere",
            step,
            previous=self.previous,
            line=self.line,
            created=f"2030-01-01T00:00:{self.num_saves:02d}.000+00:00",
            tokenizer_sha256=str(self.num_resumes),
        )
        staging = staging_directory(step_directory(self.checkpoints, step))
        written.rename(staging)
        return staging

    def save(self, step, *, is_named=True):
        self.num_saves += 1
        target = step_directory(self.checkpoints, step)
        publish(self.stage(step), target)
        self.previous = read_manifest(target).sha256
        self.line = ((step, self.previous), *self.line)
        if is_named:
            write_latest(self.checkpoints, step, self.previous)

    def found(self):
        return [int(path.name[-8:]) for path in find_checkpoints(self.checkpoints.parent)]


def damage_manifest(checkpoints, step):
    path = step_directory(checkpoints, step) / MANIFEST_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
