"""Staleness, execution and recording, on stages of a few lines."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from pipeline.run.config import Config
from pipeline.run.errors import BusyError, GateError, InputError, StageError
from pipeline.run.files import folder_files
from pipeline.run.manifest import ManifestError
from pipeline.run.parameters import PATH, UNKEYED, Params
from pipeline.run.runner import Runner
from pipeline.run.stage import Gate, Stage
from pipeline.run.state import RunState


class ReadParams(Params, frozen=True):
    file: Annotated[str, PATH] = "contract.txt"
    suffix: str = ""


class DoubleParams(Params, frozen=True):
    times: int = 2
    limit: Annotated[int, UNKEYED] = 100


class LastParams(Params, frozen=True):
    words: tuple[str, ...] = ()


class Length(msgspec.Struct):
    length: int  # characters


@dataclass
class Behaviour:
    """What the stages do besides their work, and what they did."""

    ran: list[str] = field(default_factory=list)
    before_double: object = None
    tools: tuple[str, ...] = ("numpy",)


class Bench:
    """A project of three stages: read -> double -> last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.does = Behaviour()
        self.params = {"read": ReadParams(), "double": DoubleParams(), "last": LastParams()}
        self.seed = 0
        self.lines: list[str] = []
        (root / "contract.txt").write_text("abc")
        self.stages = {
            "read": Stage(
                inputs=(),
                outputs={"contract": "contract.txt"},
                params=ReadParams,
                facts=Length,
                run=self.read,
                sources=lambda params, root: {"contract": root / params.file},
            ),
            "double": Stage(
                inputs=("contract",),
                outputs={"doubled": "doubled"},
                params=DoubleParams,
                facts=Length,
                run=self.double,
                gates=lambda params, facts: [
                    Gate("length", facts.length <= params.limit, f"length {facts.length}")
                ],
                tools=lambda params: self.does.tools,
            ),
            "last": Stage(
                inputs=("doubled",),
                outputs={"end": "end.txt"},
                params=LastParams,
                facts=dict,
                run=self.last,
            ),
        }

    def read(self, job, params):
        self.does.ran.append("read")
        text = job.sources["contract"].read_text() + params.suffix
        job.outputs.contract.write_text(text)
        return Length(len(text))

    def double(self, job, params):
        self.does.ran.append("double")
        if self.does.before_double:
            self.does.before_double(job)
        text = job.inputs.contract.read_text() * params.times
        job.outputs.doubled.mkdir()
        (job.outputs.doubled / "a.txt").write_text(text)
        (job.outputs.doubled / "b.txt").write_text("b")
        return Length(len(text))

    def last(self, job, params):
        self.does.ran.append("last")
        assert job.facts.read.length > 0
        job.outputs.end.write_text("end")
        return {}

    @property
    def config(self) -> Config:
        return Config(path=self.root / "kdpipe.yaml", run="r", seed=self.seed, params=self.params)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "r"

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    def run(self, *names, **options):
        self.does.ran.clear()
        runner = Runner(RunState(self.config, self.stages), echo=self.lines.append)
        runner.run(names or list(self.stages), **options)
        return list(self.does.ran)

    def states(self):
        return {n: e.state for n, e in RunState(self.config, self.stages).examine().items()}

    def reason(self, name):
        return RunState(self.config, self.stages).examine()[name].reason


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def snapshot(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder_files(folder)}


def test_all_stages_run_once_and_then_none(bench):
    assert bench.run() == ["read", "double", "last"]
    before = snapshot(bench.root)
    assert bench.run() == []
    assert snapshot(bench.root) == before
    assert set(bench.states().values()) == {"fresh"}


def test_the_record_tells_what_happened(bench):
    bench.run()
    record = bench.manifest["stages"]["double"]
    assert record["status"] == "ok"
    assert len(record["key"]) == 64
    assert record["params"] == {"times": 2}
    assert record["facts"] == {"length": 6}
    assert record["inputs"] == {"contract": bench.manifest["artifacts"]["contract"]["sha256"]}
    assert record["gate"] == {"length": {"passed": True, "message": "length 6", "allowed": ""}}
    assert record["versions"].keys() == {"numpy"}
    assert record["log"] == "logs/double-1.log"
    assert (bench.folder / record["log"]).exists()
    assert bench.manifest["contract"]["size_bytes"] == 3
    source = bench.manifest["stages"]["read"]["sources"]["contract"]
    assert source["path"] == "contract.txt"


@pytest.mark.parametrize(
    ("change", "reruns", "reason"),
    [
        (lambda b: b.params.update(double=DoubleParams(times=3)), ["double"], "times was 2, now 3"),
        (lambda b: setattr(b, "seed", 4), ["read", "double", "last"], "seed was 0, now 4"),
        (lambda b: b.params.update(double=DoubleParams(limit=99)), [], ""),
        (lambda b: b.params.update(read=ReadParams(suffix="")), [], ""),
        (
            lambda b: b.params.update(last=LastParams(words=("x",))),
            ["last"],
            'words was [], now ["x"]',
        ),
    ],
)
def test_only_what_a_change_concerns_reruns(bench, change, reruns, reason):
    bench.run()
    change(bench)
    if reruns:
        assert reason in bench.reason(reruns[0])
    ran = bench.run()
    assert ran[: len(reruns)] == reruns
    assert bench.run() == []


def test_equal_outputs_end_the_chain_of_reruns(bench):
    bench.run()
    bench.params["read"] = ReadParams(file="other.txt")
    (bench.root / "other.txt").write_text("abc")  # another name, the same bytes
    assert bench.run() == []


def test_a_byte_of_the_contract_makes_every_stage_stale_and_names_the_file(bench):
    bench.run()
    old = bench.manifest["contract"]["sha256"]
    (bench.root / "contract.txt").write_text("abd")
    states = RunState(bench.config, bench.stages).examine()
    for name in bench.stages:
        assert states[name].state == "stale"
        assert f"contract.txt was {old}, now " in states[name].reason
    assert bench.run() == ["read", "double", "last"]


def test_an_edited_output_makes_its_stage_stale(bench):
    bench.run()
    path = bench.folder / bench.manifest["artifacts"]["doubled"]["path"] / "a.txt"
    path.write_text("edited")
    assert bench.states() == {"read": "fresh", "double": "stale", "last": "stale"}
    assert "was changed: expected" in bench.reason("double")
    assert bench.run() == ["double"]  # then last is fresh again: double made the same bytes
    shutil.rmtree(bench.folder / "double")
    assert "can't be read" in bench.reason("double")


def test_another_release_of_a_tool_is_a_reason(bench, monkeypatch):
    bench.run()
    monkeypatch.setattr("pipeline.run.state.installed_version", lambda name: "99.0")
    assert bench.states() == {"read": "fresh", "double": "stale", "last": "stale"}
    assert "numpy was " in bench.reason("double")
    # But what it made may feed a later stage on this other machine, and so on down the line.
    assert bench.run("last", force=True) == ["last"]
    bench.params["read"] = ReadParams(suffix="!")
    with pytest.raises(InputError, match="double is stale"):
        bench.run("last", force=True)


def test_a_tool_that_is_not_here_cannot_have_changed_anything(bench, monkeypatch):
    bench.run()
    monkeypatch.setattr("pipeline.run.state.installed_version", lambda name: None)
    assert set(bench.states().values()) == {"fresh"}


def test_sources_that_are_not_here_do_not_make_a_run_stale(bench):
    bench.run()
    (bench.root / "contract.txt").unlink()
    assert set(bench.states().values()) == {"fresh"}
    assert bench.run() == []
    bench.params["read"] = ReadParams(file="renamed.txt")
    assert bench.states()["read"] == "stale"


def test_one_stage_refuses_inputs_that_are_missing_or_stale(bench):
    with pytest.raises(
        InputError, match=r"double needs 'contract'.*manifest.json does not have"
    ) as r:
        bench.run("double")
    assert "read makes it:  kdpipe run --stage read" in str(r.value)
    assert not bench.folder.exists()
    bench.run()
    bench.params["read"] = ReadParams(suffix="!")
    with pytest.raises(InputError, match="double needs 'contract', but read is stale: suffix was"):
        bench.run("double", force=True)
    bench.params["read"] = ReadParams()
    shutil.rmtree(bench.folder / "read")
    with pytest.raises(ManifestError, match=r"artifact contract .* can't be read"):
        bench.run("double", force=True)


def test_force_runs_what_is_fresh(bench):
    bench.run()
    assert bench.run("double", force=True) == ["double"]
    assert bench.manifest["stages"]["double"]["attempts"] == 2
    assert bench.manifest["artifacts"]["doubled"]["path"] == "double/002/doubled"
    assert not (bench.folder / "double" / "001").exists()


def fail(error):
    def before(job):
        (job.outputs.doubled.parent / "half.txt").write_text("half")
        print("words of a library")
        raise error

    return before


def test_a_failure_keeps_the_last_good_state_and_is_no_result(bench):
    bench.run()
    good = bench.manifest
    bench.params["double"] = DoubleParams(times=5)
    bench.does.before_double = fail(StageError("the compiler said no"))
    with pytest.raises(StageError, match="the compiler said no"):
        bench.run()
    record = bench.manifest["stages"]["double"]
    assert record["status"] == "failed"
    assert record["error"]["message"] == "the compiler said no"
    assert record["log"] == "logs/double-2.log"
    log = (bench.folder / record["log"]).read_text()
    assert "words of a library" in log
    assert "Traceback" in log
    assert any("log: runs/r/logs/double-2.log" in line for line in bench.lines)
    assert bench.manifest["artifacts"] == good["artifacts"]
    assert not (bench.folder / "double.partial").exists()
    assert bench.states()["double"] == "failed"
    assert bench.reason("double") == "the compiler said no"

    bench.params["double"] = DoubleParams()  # back to what worked: nothing has to run
    assert bench.run() == []
    bench.params["double"] = DoubleParams(times=5)
    bench.does.before_double = None
    assert bench.run() == ["double", "last"]  # without force


def test_a_bug_is_reported_as_one(bench):
    bench.does.before_double = fail(KeyError("oops"))
    with pytest.raises(StageError, match="double failed: KeyError: 'oops'"):
        bench.run()
    assert bench.states() == {"read": "fresh", "double": "failed", "last": "missing"}


def test_a_full_disk_is_one_line(bench, monkeypatch):
    bench.run("read")
    before = (bench.folder / "manifest.json").read_bytes()
    real, fsync = os.fsync, []

    def full(handle):
        fsync.append(handle)
        if len(fsync) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StageError, match="double failed: No space left on device"):
        bench.run("double")
    monkeypatch.undo()
    assert (
        json.loads((bench.folder / "manifest.json").read_text())["artifacts"]
        == (json.loads(before)["artifacts"])
    )
    assert not (bench.folder / "double").exists()
    assert bench.states()["double"] in ("failed", "interrupted")
    assert bench.run() == ["double", "last"]


def test_a_disk_that_is_full_is_named_whatever_the_library_says(bench, monkeypatch):
    bench.run("read")
    usage = shutil.disk_usage(bench.root)

    def fill_the_disk(job):
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=4 << 10))
        raise RuntimeError("PytorchStreamWriter failed")

    bench.does.before_double = fill_the_disk
    with pytest.raises(StageError) as caught:
        bench.run("double")
    assert str(caught.value) == (
        "double failed: RuntimeError: PytorchStreamWriter failed; the disk of runs/r is full "
        "(4 KiB are free), make room"
    )


def test_a_full_disk_without_any_temporary_folder_does_not_hide_the_failure(bench, monkeypatch):
    def nowhere():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    bench.does.before_double = fail(KeyError("oops"))
    with pytest.raises(StageError, match=r"double failed: KeyError: 'oops'$"):
        bench.run()


def test_the_file_that_could_not_be_written_is_named_from_the_project(bench):
    target = bench.root / "runs" / "big.ckpt"
    error = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/t", None, str(target))
    bench.does.before_double = fail(error)
    with pytest.raises(StageError, match=r"double failed: No space left on device \(runs/big.ckpt"):
        bench.run()


def test_too_little_space_is_seen_before_it_starts(bench, monkeypatch):
    usage = shutil.disk_usage(bench.root)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(
        StageError, match="read needs about 64 MiB of disk space and 1 MiB are free"
    ):
        bench.run()
    assert bench.does.ran == []
    # It ended before there was a log, so none is named.
    assert bench.manifest["stages"]["read"]["error"]["hint"] == ""


def test_a_users_mistake_leaves_the_manifest_byte_for_byte(bench):
    bench.run("read")
    before = (bench.folder / "manifest.json").read_bytes()
    bench.does.before_double = fail(InputError("row 7 holds NaN"))
    with pytest.raises(InputError, match="row 7 holds NaN"):
        bench.run()
    assert (bench.folder / "manifest.json").read_bytes() == before
    assert not (bench.folder / "double.partial").exists()


def test_a_first_run_that_cannot_start_makes_no_folder(bench):
    (bench.root / "contract.txt").unlink()
    with pytest.raises(InputError, match=r"kdpipe.yaml: read.contract: there is no contract"):
        bench.run()
    assert not (bench.root / "runs").exists()


def test_an_interruption_is_recorded(bench):
    bench.does.before_double = fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert bench.states() == {"read": "fresh", "double": "interrupted", "last": "missing"}
    bench.does.before_double = None
    assert bench.run() == ["double", "last"]


def test_a_killed_attempt_is_seen_and_repeated(bench):
    bench.run("read")
    manifest = bench.manifest
    manifest["stages"]["double"] = {"status": "running", "attempts": 1}
    (bench.folder / "manifest.json").write_text(json.dumps(manifest))
    (bench.folder / "double.partial" / "doubled").mkdir(parents=True)
    assert bench.states()["double"] == "interrupted"
    assert "killed" in bench.reason("double")
    assert bench.run() == ["double", "last"]


def test_a_source_that_changes_while_it_is_read_is_refused(bench):
    def touch(job):
        (bench.root / "contract.txt").write_text("changed")

    original = bench.stages["read"].run

    def read(job, params):
        facts = original(job, params)
        touch(job)
        return facts

    bench.stages["read"] = Stage(**{**vars(bench.stages["read"]), "run": read})
    with pytest.raises(InputError, match="source contract changed while read read it"):
        bench.run()
    assert not (bench.folder / "manifest.json").exists()


def test_a_stage_that_forgets_an_output_is_found_out(bench):
    bench.stages["last"] = Stage(**{**vars(bench.stages["last"]), "run": lambda job, params: {}})
    with pytest.raises(StageError, match=r"last did not write end \(end\.txt\)"):
        bench.run()


def edit_facts(bench, stage, facts):
    manifest = bench.manifest
    manifest["stages"][stage]["facts"] = facts
    (bench.folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_record_whose_facts_do_not_fit_is_stale_and_says_where(bench):
    bench.run()
    edit_facts(bench, "double", {"size": 6})
    assert bench.states() == {"read": "fresh", "double": "stale", "last": "stale"}
    assert bench.reason("double") == (
        "another kdpipe wrote its record: facts: object missing required field `length`"
    )
    with pytest.raises(InputError, match="but double is stale: another kdpipe"):
        bench.run("last")
    assert bench.run() == ["double"]  # it makes the same, so `last` need not run
    assert bench.states()["last"] == "fresh"


def test_who_reads_facts_that_do_not_fit_or_are_not_there_gets_one_line(bench):
    bench.run("read")
    edit_facts(bench, "read", {"length": "six"})
    facts = RunState(bench.config, bench.stages).facts
    with pytest.raises(ManifestError, match=r"stages\.read\.facts\.length: expected `int`"):
        _ = facts.read
    with pytest.raises(ManifestError, match="run r has no facts of last, which did not run yet"):
        _ = facts.last
    with pytest.raises(LookupError, match=r"raed is not among the stages \(read, double, last\)"):
        _ = facts.raed


def test_facts_that_their_own_type_refuses_are_a_bug_of_the_stage(bench):
    bench.stages["last"] = Stage(
        **{**vars(bench.stages["last"]), "facts": Length, "run": lambda job, params: Length("six")}
    )
    with pytest.raises(StageError, match=r"last reports .* refuses: facts\.length: expected `int`"):
        bench.run()


def test_a_gate_that_says_no_keeps_what_was_made_and_ends_the_run(bench):
    bench.params["double"] = DoubleParams(limit=5)
    with pytest.raises(GateError, match=r"double: gate length did not pass: length 6") as refusal:
        bench.run()
    assert refusal.value.status == 4
    assert "--allow gate=length" in str(refusal.value)
    assert bench.manifest["stages"]["double"]["status"] == "ok"
    assert not bench.manifest["stages"]["double"]["gate"]["length"]["passed"]
    assert bench.states() == {"read": "fresh", "double": "fresh", "last": "missing"}

    assert bench.run(allow={"length": "known"}) == ["last"]
    assert bench.manifest["stages"]["double"]["gate"]["length"]["allowed"].endswith(" known")
    before = snapshot(bench.root)
    assert bench.run(allow={"length": "known"}) == []
    assert snapshot(bench.root) == before
    with pytest.raises(GateError):
        bench.run()


def test_a_new_limit_judges_again_without_running(bench):
    bench.run()
    bench.params["double"] = DoubleParams(limit=5)
    with pytest.raises(GateError):
        bench.run()
    assert bench.does.ran == []
    bench.params["double"] = DoubleParams(limit=6)
    assert bench.run() == []
    assert bench.manifest["stages"]["double"]["gate"]["length"]["passed"]


def test_what_is_not_ready_is_said_before_anything_starts(bench):
    def not_ready(params):
        raise StageError("no SDK here")

    bench.stages["last"] = Stage(**{**vars(bench.stages["last"]), "ready": not_ready})
    with pytest.raises(StageError, match="no SDK here"):
        bench.run()
    assert bench.does.ran == []
    assert not (bench.root / "runs").exists()


def test_a_run_folder_that_cannot_be_written_is_one_line(bench, read_only_folder):
    (bench.root / "runs").symlink_to(read_only_folder)
    with pytest.raises(InputError, match="can't write to runs/r: "):
        bench.run()


def test_a_second_process_is_refused_with_the_firsts_pid(bench):
    bench.run("read")

    def second(job):
        with pytest.raises(BusyError, match="runs/r is in use by another kdpipe"):
            Runner(RunState(bench.config, bench.stages)).run(["read"], force=True)

    bench.does.before_double = second
    assert bench.run() == ["double", "last"]
    assert not (bench.folder / "lock.holder").exists()


def test_a_source_found_while_working_counts_too(bench):
    extra = bench.root / "weights.bin"
    extra.write_bytes(b"1")
    original = bench.stages["read"].run

    def read(job, params):
        job.also_read("contract", extra)
        return original(job, params)

    bench.stages["read"] = Stage(**{**vars(bench.stages["read"]), "run": read})
    bench.run()
    assert bench.run() == []
    extra.write_bytes(b"2")
    assert "weights.bin" in bench.reason("read")
    assert bench.run() == ["read"]


def test_a_file_outside_the_project_is_recorded_by_name_only(bench, tmp_path_factory):
    outside = tmp_path_factory.mktemp("data") / "big.txt"
    outside.write_text("abc")
    bench.params["read"] = ReadParams(file=str(outside))
    bench.run()
    assert bench.manifest["stages"]["read"]["sources"]["contract"]["path"] == "big.txt"
    assert str(outside.parent) not in (bench.folder / "manifest.json").read_text()
    assert bench.run() == []
