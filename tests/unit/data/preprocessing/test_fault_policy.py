"""Bad documents are left out and counted, and too many of them make no pair."""

import json

import pytest
from encoding_jobs import encode, write_jsonl


def test_skip_leaves_bad_documents_out_and_counts_them_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.preprocess.SHARD_BYTES", 200)
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(60)]
    bad = [b"{", b'{"body": 1}', b'{"text": 1}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[]"]
    lines = good[:30] + bad + [b'{"text": ""}'] + good[30:]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines))
    said: list[str] = []
    manifest = encode(
        source,
        tmp_path / "out",
        on_error="skip",
        largest_skipped_share=0.1,
        report=said.append,
    )
    assert manifest.num_documents == 60
    assert manifest.skipped == {
        "invalid JSON": 1,
        'no key "text"': 1,
        "no string": 1,
        "lone surrogate": 1,
        "invalid UTF-8": 1,
        "no JSON object": 1,
        "no text": 1,
    }
    places = [line for line in said if line.startswith("left out:")]
    assert len(places) == 6 and f"{source}:31: invalid JSON" in places[0]
    assert f"{source}:36: list instead" in places[-1]
    with pytest.raises(ValueError, match=r"6 of 66 documents are bad .*allowed is a share of 0.05"):
        encode(source, tmp_path / "other", on_error="skip", largest_skipped_share=0.05)
    assert not list(tmp_path.glob("other.bin"))


def test_all_documents_empty_is_an_error_under_skip_too(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(ValueError, match="the input holds no text"):
        encode(source, tmp_path / "out", on_error="skip")
    assert list(tmp_path.iterdir()) == [source]
