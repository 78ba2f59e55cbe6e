"""Records of steps for tests of what follows them."""

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.config.schema import Config
from megagpt.training.followers.record import StepRecord
from megagpt.training.train_step import StepResult


def record(step=1, *, loss=2.0, **more):
    """A step of 10 tokens that took two seconds."""
    state = CheckpointState(
        step=step,
        consumed_samples=4 * step,
        consumed_tokens=10 * step,
        config=Config(),
        data_fingerprint={},
        learning_rate=1e-3,
    )
    result = more.pop("result", StepResult(loss=loss, num_tokens=10, grad_norm=0.5))
    options = {"seconds": 2.0, "data_wait_seconds": 0.5, "was_applied": True} | more
    return StepRecord(state, result, **options)
