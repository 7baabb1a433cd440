import json

import numpy as np
import pytest
from tiny_project import TEACHER_ROUNDING, make_contract, make_patches, make_teacher

from pipeline.data.blocks import BLOCK
from pipeline.data.formats.npz import open_npz
from pipeline.data.splits import Split
from pipeline.data.views import take_view
from pipeline.params.sources import TeacherParams, ViewParams
from pipeline.teachers.logit_cache import LogitCache, teacher_digest
from pipeline.teachers.open import open_teacher
from preprocessing.contract import parse_contract

COUNT = 2 * BLOCK + 100


@pytest.fixture
def asked(tmp_path):
    """Two teachers, three views, and a split of a little over two blocks."""
    patches, labels = make_patches(COUNT, seed=4)
    np.savez(tmp_path / "x.npz", images=patches, labels=labels)
    made = make_contract(patches)
    contract = parse_contract(json.dumps(made).encode())
    teachers = []
    for name, bands in (("a", (0, 1, 2)), ("b", (3, 1))):
        make_teacher(tmp_path / f"{name}.onnx", bands, made)
        params = TeacherParams(path=f"{name}.onnx", bands=bands, features=("pooled",))
        teachers.append(
            open_teacher(
                tmp_path / f"{name}.onnx",
                params,
                contract,
                contract.bind(params.modality, params.bands, 4),
            )
        )
    digests = [teacher_digest(t, contract.sha256, [t.name]) for t in teachers]
    source = open_npz(tmp_path / "x.npz", {"optical": "images"}, "labels")
    split = Split("train", source, np.arange(COUNT))
    return LogitCache(teachers, digests, ViewParams(count=3), 7, tmp_path / "labels"), split


def files(asked):
    return sorted(p for p in asked.folder.rglob("*") if p.is_file())


def test_the_answers_are_those_of_the_teachers_to_each_view(asked):
    cache, split = asked
    cache.fill(split, "s", 3)
    patches = split.source.read("optical", split.rows, range(4))
    whole = [[], []]
    for part, found in cache.read_blocks(split, "s", 3):
        assert found[0][0].shape == (3, part.stop - part.start, 3)
        for i in (0, 1):
            whole[i].append(found[i][0])
            assert found[i][1].shape[2:] == ((3, 1, 1), (2, 1, 1))[i]
    for i, teacher in enumerate(cache.teachers):
        cached = np.concatenate(whole[i], axis=1)
        for view in range(3):
            seen = take_view(patches, split.rows, view, cache.views, 7)[..., list(teacher.bands)]
            assert cached[view] == pytest.approx(teacher.outputs(seen)[0], abs=TEACHER_ROUNDING)
        assert not np.allclose(cached[0], cached[1])


def test_shards_together_are_the_whole_and_tell_what_is_missing(asked):
    cache, split = asked
    assert cache.count_missing(split, "s", 1) == (3, 3)
    counted = []
    cache.fill(split, "s", 1, shard=(1, 2), progress=counted.append)
    assert sum(counted) == BLOCK
    assert cache.count_missing(split, "s", 1) == (2, 3)
    cache.fill(split, "s", 1, shard=(0, 2))
    assert cache.count_missing(split, "s", 1) == (0, 3)


def test_a_kill_costs_the_block_it_came_in_and_nothing_else(asked):
    cache, split = asked

    class Killed(BaseException):
        pass

    seen = []

    def kill_after_the_first_block(n):
        seen.append(n)
        if sum(seen):
            raise Killed

    with pytest.raises(Killed):
        cache.fill(split, "s", 1, progress=kill_after_the_first_block)
    kept = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert len(kept) == 2  # one block of each teacher
    cache.fill(split, "s", 1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(files(cache)) == 6
    for path, damage in zip(kept, (lambda b: b[: len(b) // 2], lambda b: b""), strict=True):
        path.write_bytes(damage(path.read_bytes()))  # copied by halves from another machine
    assert cache.count_missing(split, "s", 1) == (1, 3)
    cache.fill(split, "s", 1)
    assert len(list(cache.read_blocks(split, "s", 1))) == 3


def test_whatever_decides_an_answer_decides_its_name(asked):
    cache, split = asked
    cache.fill(split, "s", 1)
    before = files(cache)
    cache.fill(split, "s", 1)
    assert files(cache) == before
    assert cache.count_missing(split, "other source", 1)[0] == 3
    assert cache.count_missing(split, "s", 2)[0] == 3
    assert cache.count_missing(split.without(np.array([5])), "s", 1)[0] == 3
    first = cache.teachers[0]
    one = teacher_digest(first, "contract", ["file"])
    assert one == teacher_digest(first, "contract", ["file"])
    assert one != teacher_digest(first, "another", ["file"])
    assert one != teacher_digest(first, "contract", ["edited"])
