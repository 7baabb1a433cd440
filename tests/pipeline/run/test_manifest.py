import json
import os

import pytest

from pipeline.run.digests import REMEMBER_FROM_BYTES, Digests
from pipeline.run.files import write_atomically
from pipeline.run.manifest import Manifest, ManifestError, StageRecord, load_manifest


def manifest():
    return Manifest(schema=1, run="r", kdpipe="0", created="t", updated="t")


def test_a_manifest_survives_its_file(tmp_path):
    one = manifest().with_stage("ingest", StageRecord(status="ok", key="k", facts={"a": [1, None]}))
    one.save(tmp_path)
    assert load_manifest(tmp_path) == one
    assert not list(tmp_path.glob("*.partial"))
    assert load_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ('{"schema": 99}', "has schema 99; this kdpipe reads 1"),
        ('{"schema": 1, "run": 3}', "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused_and_left_alone(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=words):
        load_manifest(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folders_digest_follows_names_and_contents(tmp_path):
    digests = Digests(tmp_path / "memory.json")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("22")
    first, size = digests.path(folder)
    assert size == 3
    assert digests.path(folder) == (first, 3)
    (folder / "a").rename(folder / "c")
    assert digests.path(folder)[0] != first


def test_big_files_are_hashed_once_and_again_when_they_change(tmp_path):
    big = tmp_path / "big"
    big.write_bytes(b"\0" * REMEMBER_FROM_BYTES)
    seen = []
    Digests(tmp_path / "memory.json", seen.append).path(big)
    assert sum(seen) == REMEMBER_FROM_BYTES
    learned = Digests(tmp_path / "memory.json", seen.append)
    digest = learned.file(big)
    learned.save()
    assert "big" not in (tmp_path / "memory.json").read_text()

    seen.clear()
    again = Digests(tmp_path / "memory.json", seen.append)
    assert again.file(big) == digest
    assert seen == []
    assert again.file(big, fresh=True) == digest
    assert sum(seen) == REMEMBER_FROM_BYTES

    with big.open("r+b") as file:
        file.write(b"\1")
    assert Digests(tmp_path / "memory.json").file(big) != digest


def test_a_damaged_or_unwritable_memory_costs_only_time(tmp_path, read_only_folder):
    big = tmp_path / "big"
    big.write_bytes(b"\0" * REMEMBER_FROM_BYTES)
    (tmp_path / "memory.json").write_text("{")
    digest = Digests(tmp_path / "memory.json").file(big)
    elsewhere = Digests(read_only_folder / "memory.json")
    assert elsewhere.file(big) == digest
    elsewhere.save()


def test_the_manifest_is_for_people_too(tmp_path):
    manifest().with_stage("ingest", StageRecord(status="ok", reason="größer")).save(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "größer" in text
    assert text.count("\n") > 10
    assert json.loads(text)["schema"] == 1
