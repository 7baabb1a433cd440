"""Run what is stale, record it, and leave the last good state whatever happens."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from metis.backend import BackendError
from pipeline.environment import describe_environment, installed
from pipeline.manifest import (
    LISTING_SUFFIX,
    SCHEMA,
    Artifact,
    ContractRecord,
    Failure,
    GateRecord,
    Manifest,
    ManifestError,
    Source,
    StageRecord,
    folder_files,
    sync_folder,
    write_atomically,
)
from pipeline.stage import ExtraMissingError, Gate, InputError, Job, StageError
from pipeline.staleness import HOLDER_FILE, RunState, key_of
from preprocessing.contract import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tqdm import tqdm

    from pipeline.config import Config
    from pipeline.stage import Stage

#: What a user's own files can cause. Nothing was made, so the manifest stays as it was.
USER_ERRORS = (ContractError, InputError, ManifestError)

#: Failures whose message is meant for the user; all others are the machine's (OSError) or bugs.
STAGE_ERRORS = (StageError, BackendError, ExtraMissingError)

#: Free disk space to keep beyond what the last run of a stage needed.
SPARE_BYTES = 64 << 20

#: Less than this is left when a write failed for want of space.
FULL_DISK_BYTES = 1 << 20


class BusyError(ValueError):
    """Another process works on the run folder."""


class GateError(RuntimeError):
    """A gate said no; `status` is the exit status for it."""

    def __init__(self, stage: str, gate: Gate) -> None:
        """Say which gate of which stage."""
        super().__init__(
            f"{stage}: gate {gate.name} did not pass: {gate.message}\n"
            f"  what was made stays; to go on all the same: --allow gate={gate.name}"
        )
        self.status = gate.status


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


class Runner:
    """Executes stages of one run folder."""

    def __init__(
        self,
        config: Config,
        stages: Mapping[str, Stage[Any]],
        *,
        echo: Callable[[str], None] = lambda line: None,
        debug: bool = False,
    ) -> None:
        """Read the run folder; `echo` gets a line per event, `debug` keeps what failed."""
        self.state = RunState(config, stages)
        self.config = config
        self.stages = stages
        self.folder = config.folder
        self._echo = echo
        self._debug = debug

    def run(
        self,
        selected: Sequence[str],
        *,
        force: bool = False,
        allow: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Run what is stale among the selected stages, in order.

        Args:
            selected: names of stages, in order.
            force: run them even if they are fresh.
            allow: gates that may say no, and the user's reason.

        Returns:
            The stages that ran.

        Raises:
            InputError: the run folder can't be written, or a stage that is not selected would have
                to run first.
            BusyError: another process works on this run.
            GateError: a gate said no, and was not allowed to.
        """
        allow = allow or {}
        states = self.state.examine()
        self.state.digests.save()
        if force or any(
            states[name].state != "fresh" or self._rejudged(name, allow) for name in selected
        ):
            self._check_ready([n for n in selected if force or states[n].state != "fresh"])
            self.require_inputs(selected[0])
            return self._run_locked(selected, force, allow)
        for name in selected:  # nothing to do takes no lock and writes nothing
            self._echo(f"{name:<10} fresh    {states[name].reason}")
            self._refuse(name, allow)
        return []

    def _check_ready(self, names: Sequence[str]) -> None:
        """Before anything is written: every file is there, and every tool."""
        for name in names:
            params = self.config.params[name]
            for source, path in self.stages[name].sources(params, self.config.root).items():
                if not path.exists():
                    raise InputError(
                        f"{self.config.path.name}: {name}.{source}: there is no "
                        f"{self.state.shown(path)}"
                    )
            self.stages[name].ready(params)

    def _run_locked(
        self, selected: Sequence[str], force: bool, allow: Mapping[str, str]
    ) -> list[str]:
        ran = []
        with self._locked():
            self.state = RunState(self.config, self.stages)
            for name in selected:
                state = self.state.examine()[name]
                self.require_inputs(name)
                if state.state == "fresh" and not force:
                    self._echo(f"{name:<10} fresh    {state.reason}")
                else:
                    self._execute(name, "forced" if state.state == "fresh" else state.reason)
                    ran.append(name)
                self._judge(name, allow)
        return ran

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        shown = self.state.shown(self.folder)
        # Not in the lock itself: some releases of filelock empty it when they try to take it.
        holder = self.folder / HOLDER_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock", timeout=0)
            lock.acquire()
            holder.write_text(f"pid {os.getpid()} since {_now()}\n")
        except Timeout as error:
            who = self.state.holder() or "it just started"
            raise BusyError(
                f"{shown} is in use by another kdpipe ({who}); wait for it, or stop it"
            ) from error
        except OSError as error:
            words = _os_words(error, self.config.root)
            raise InputError(f"can't write to {shown}: {words}") from error
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def require_inputs(self, name: str) -> None:
        """Refuse to run a stage whose inputs are missing, stale or damaged; say what makes them."""
        states = self.state.examine()
        for needed in self.stages[name].inputs:
            maker = self.state.maker[needed]
            cure = f"  {maker} makes it:  kdpipe run --stage {maker}"
            if self.state.artifact(needed) is None:
                manifest = self.state.shown(self.folder / "manifest.json")
                raise InputError(
                    f"{name} needs {needed!r}, which {manifest} does not have.\n{cure}"
                )
            if problem := self.state.damage(needed):
                raise ManifestError(f"{problem}.\n{cure}")
            if not states[maker].usable:
                raise InputError(
                    f"{name} needs {needed!r}, but {maker} is {states[maker].state}: "
                    f"{states[maker].reason}.\n{cure}"
                )

    def _execute(self, name: str, reason: str) -> None:
        attempt = _Attempt(self.state, name, self._echo, keep=self._debug)
        manifest_file = self.folder / "manifest.json"
        untouched = manifest_file.read_bytes() if manifest_file.exists() else None
        self._echo(f"{name:<10} runs     {reason}")
        try:
            attempt.begin(reason)
            self._save(name, attempt.record)
            completed, artifacts = attempt.work()
            self._commit(name, completed, artifacts)
        except KeyboardInterrupt:
            failure = Failure("Interrupted", f"{name} was interrupted")
            self._save(name, attempt.ended("interrupted", failure))
            raise
        except USER_ERRORS:
            _restore(manifest_file, untouched)
            self.state = RunState(self.config, self.stages)
            raise
        except Exception as error:
            meant_for_users = isinstance(error, STAGE_ERRORS)
            if meant_for_users:
                what = str(error)
            elif isinstance(error, OSError):
                what = _os_words(error, self.config.root) + self._full_disk_words()
            else:
                what = f"{type(error).__name__}: {error}{self._full_disk_words()}"
            failure = Failure(type(error).__name__, what, attempt.log_words)
            with suppress(OSError):  # a full disk must not hide why we are here
                self._save(name, attempt.ended("failed", failure))
            self._echo(f"{name:<10} failed   {attempt.log_words}".rstrip())
            if meant_for_users:
                raise
            raise StageError(f"{name} failed: {what}") from error
        finally:
            attempt.clean()
        for warning in completed.warnings:
            self._echo(f"{'':<10} warning  {warning}")
        self._echo(f"{name:<10} done     {completed.seconds:.1f} s")

    def _full_disk_words(self) -> str:
        """Which disk is full, if one is: libraries tell it in many ways, some in none."""

        def written() -> Iterator[Path]:
            yield self.folder
            yield Path(tempfile.gettempdir())

        with suppress(OSError):  # no temporary folder at all; that must not hide why we are here
            for folder in written():
                if (free := shutil.disk_usage(folder).free) < FULL_DISK_BYTES:
                    where = self.state.shown(folder)
                    return f"; the disk of {where} is full ({free >> 10} KiB are free), make room"
        return ""

    def _commit(self, name: str, record: StageRecord, artifacts: Mapping[str, Artifact]) -> None:
        """Make a completed attempt the current one, then drop the generations before it."""
        manifest = self._manifest()
        contract = artifacts.get("contract")
        manifest = replace(
            manifest,
            artifacts={**manifest.artifacts, **artifacts},
            contract=ContractRecord(contract.sha256, contract.size_bytes)
            if contract
            else manifest.contract,
        )
        self._save(name, record, manifest)
        current = {artifact.path.split("/")[1] for artifact in artifacts.values()}
        for generation in (self.folder / name).iterdir():
            if generation.name not in current:
                shutil.rmtree(generation, ignore_errors=True)
        for scratch in (self.folder / "scratch").glob(f"{name}-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        self.state.digests.save()

    def _manifest(self) -> Manifest:
        now = _now()
        return self.state.manifest or Manifest(
            schema=SCHEMA,
            run=self.config.run,
            kdpipe=installed("kdpipe") or "unknown",
            created=now,
            updated=now,
        )

    def _save(self, name: str, record: StageRecord, manifest: Manifest | None = None) -> None:
        manifest = replace(
            (manifest or self._manifest()).with_stage(name, record),
            kdpipe=installed("kdpipe") or "unknown",
            updated=_now(),
            environment=describe_environment(),
        )
        manifest.save(self.folder)
        self.state.manifest = manifest

    def _judge(self, name: str, allow: Mapping[str, str]) -> None:
        """Judge a completed stage by today's limits and record it; a no ends the run."""
        record = self.state.record(name)
        verdicts = self._rejudged(name, allow)
        if record and verdicts:
            self._save(name, replace(record, gate=verdicts))
        self._refuse(name, allow)

    def _gates(self, name: str) -> list[Gate]:
        record = self.state.record(name)
        if record is None or not record.key:
            return []
        return self.stages[name].gates(self.config.params[name], record.facts)

    def _rejudged(self, name: str, allow: Mapping[str, str]) -> dict[str, GateRecord]:
        """The verdicts on a stage where they differ from those on record, else nothing."""
        record = self.state.record(name)
        before = record.gate if record else {}
        verdicts = {}
        for gate in self._gates(name):
            known = before.get(gate.name)
            allowed = ""
            if not gate.passed and gate.name in allow:
                allowed = (known and known.allowed) or f"{_now()} {allow[gate.name]}".strip()
            verdicts[gate.name] = GateRecord(gate.passed, gate.message, allowed)
        return verdicts if verdicts != before else {}

    def _refuse(self, name: str, allow: Mapping[str, str]) -> None:
        for gate in self._gates(name):
            if not gate.passed and gate.name not in allow:
                raise GateError(name, gate)
            if not gate.passed:
                self._echo(f"{name:<10} allowed  gate {gate.name}: {gate.message}")


class _Attempt:
    """One try at one stage: its partial folder, its log, its record."""

    def __init__(
        self, state: RunState, name: str, echo: Callable[[str], None], *, keep: bool
    ) -> None:
        self._state = state
        self._stage = state.stages[name]
        self._params = state.config.params[name]
        self._name = name
        self._echo = echo
        self._keep = keep
        self._clock = time.monotonic()
        self._warnings: list[str] = []
        self._found: dict[str, Path] = {}
        self._partial = state.folder / f"{name}.partial"
        # Logs are never overwritten, so their numbers also give the generations theirs.
        logs = (state.folder / "logs").glob(f"{name}-*.log")
        numbers = [int(n) for n in (p.stem.rpartition("-")[2] for p in logs) if n.isdigit()]
        self._number = max(numbers, default=0) + 1
        self._log = state.folder / "logs" / f"{name}-{self._number}.log"
        self.record = StageRecord(status="pending")

    @property
    def log_words(self) -> str:
        """Where the log is; nothing where the attempt ended before it had one."""
        return f"log: {self._state.shown(self._log)}" if self._log.exists() else ""

    def begin(self, reason: str) -> None:
        """Claim the partial folder and the log."""
        before = self._state.record(self._name) or self.record
        self._check_space(before)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._log.parent.mkdir(exist_ok=True)
        self._log.touch()
        self.record = replace(
            before,
            status="running",
            reason=reason,
            attempts=before.attempts + 1,
            attempt_key=key_of(self._state.key_parts(self._name)),
            started=_now(),
            finished="",
            seconds=0.0,
            log=self._log.relative_to(self._state.folder).as_posix(),
            error=None,
        )

    def work(self) -> tuple[StageRecord, dict[str, Artifact]]:
        """Run the stage function; check, digest and publish what it made."""
        parts = self._state.key_parts(self._name)
        sources = self._stage.sources(self._params, self._state.config.root)
        inputs = {}
        for name in self._stage.inputs:
            artifact = self._state.artifact(name)
            assert artifact is not None, name
            inputs[name] = self._state.folder / artifact.path
        manifest = self._state.manifest
        job = Job(
            run=self._state.config.run,
            seed=self._state.config.seed,
            inputs=inputs,
            outputs={n: self._partial / file for n, file in self._stage.outputs.items()},
            sources=sources,
            facts={n: r.facts for n, r in (manifest.stages if manifest else {}).items() if r.key},
            progress=_progress,
            warn=self._warnings.append,
            scratch=self._scratch(key_of(parts)),
            logs=self._log.with_suffix(""),
            cache=self._state.config.root / "runs" / ".cache",
            digest=self._digest,
            also_read=self._also_read,
        )
        with self._logging():
            facts = self._stage.run(job, self._params)
        self._check_unchanged(parts)
        artifacts = self._publish()
        parts = self._state.key_parts(self._name)
        parts["sources"] = {n: self._digest(p) for n, p in {**sources, **self._found}.items()}
        record = replace(
            self.record,
            status="ok",
            finished=_now(),
            seconds=round(time.monotonic() - self._clock, 3),
            key=key_of(parts),
            attempt_key=key_of(parts),
            key_parts=parts,
            params=parts["params"],
            seed=parts["seed"],
            contract=parts["contract"],
            inputs=parts["inputs"],
            sources={
                n: Source(self._state.shown(p), *self._state.digests.path(p))
                for n, p in {**sources, **self._found}.items()
            },
            outputs=list(artifacts),
            facts=msgspec.to_builtins(facts),
            warnings=self._warnings,
            gate={},
            versions=parts["versions"],
            reproduce=f"kdpipe run --stage {self._name} --force",
        )
        return record, artifacts

    def ended(self, status: str, failure: Failure) -> StageRecord:
        """The record of an attempt that made nothing."""
        return replace(
            self.record,
            status=status,
            reason=failure.message,
            finished=_now(),
            seconds=round(time.monotonic() - self._clock, 3),
            error=failure,
        )

    def clean(self) -> None:
        """Remove what is half written; with --debug it stays until the next attempt."""
        if not self._keep:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _scratch(self, key: str) -> Path:
        """Where this stage finds what a killed attempt with the same inputs left, and no other."""
        own = self._state.folder / "scratch" / f"{self._name}-{key[:16]}"
        for other in own.parent.glob(f"{self._name}-*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        return own

    def _also_read(self, source: str, path: Path) -> None:
        beside = self._stage.sources(self._params, self._state.config.root)[source].parent
        self._found[f"{source}+{path.relative_to(beside).as_posix()}"] = path

    def _digest(self, path: Path) -> str:
        return self._state.digests.path(path)[0]

    def _check_unchanged(self, before: Mapping[str, Any]) -> None:
        now = self._state.key_parts(self._name)
        for name, digest in before["sources"].items():
            if now["sources"][name] != digest:
                raise InputError(
                    f"source {name} changed while {self._name} read it; run again when it is still"
                )
        for name in self._stage.inputs:
            if problem := self._state.damage(name):
                raise ManifestError(f"while {self._name} ran, {problem}")

    def _publish(self) -> dict[str, Artifact]:
        """Hash and sync what was written, then give it its final name in one step."""
        artifacts = {}
        generation = self._state.folder / self._name / f"{self._number:03d}"
        for name, file in self._stage.outputs.items():
            path = self._partial / file
            if not path.exists():
                raise StageError(f"{self._name} did not write {name} ({file})")
            for member in folder_files(path) if path.is_dir() else [path]:
                with member.open("rb") as handle:
                    os.fsync(handle.fileno())
            if path.is_dir():  # so that `verify` can name the one file that was changed
                listing = self._state.digests.listing(path)
                path.with_name(file + LISTING_SUFFIX).write_text(listing)
            digest, size = self._state.digests.path(path)
            relative = (generation / file).relative_to(self._state.folder).as_posix()
            artifacts[name] = Artifact(relative, digest, size, self._name)
        for folder in [p for p in self._partial.rglob("*") if p.is_dir()]:
            sync_folder(folder)
        sync_folder(self._partial)
        generation.parent.mkdir(exist_ok=True)
        shutil.rmtree(generation, ignore_errors=True)
        self._partial.rename(generation)
        sync_folder(generation.parent)
        return artifacts

    def _check_space(self, before: StageRecord) -> None:
        known = [self._state.artifact(name) for name in before.outputs]
        needed = sum(artifact.size_bytes for artifact in known if artifact) + SPARE_BYTES
        free = shutil.disk_usage(self._state.folder).free
        if free < needed:
            raise StageError(
                f"{self._name} needs about {needed >> 20} MiB of disk space and "
                f"{free >> 20} MiB are free in {self._state.shown(self._state.folder)}; make room"
            )

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Everything the stage and its libraries say goes to the log, prints included."""
        handler = logging.FileHandler(self._log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            with self._log.open("a", buffering=1) as file, redirect_stdout(file):
                yield
        except BaseException:
            logging.getLogger("kdpipe").exception("%s ended badly", self._name)
            raise
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
            root.setLevel(level)
            handler.close()


def job_outside_a_run(state: RunState, name: str, warn: Callable[[str], None]) -> Job:
    """What a stage would be given, without a place to write to: for work that only fills caches.

    Raises:
        InputError: a source is missing.
    """
    params = state.config.params[name]
    sources = state.stages[name].sources(params, state.config.root)
    for source, path in sources.items():
        if not path.exists():
            raise InputError(f"source {source} of {name} is missing: {state.shown(path)}")
    return Job(
        run=state.config.run,
        seed=state.config.seed,
        inputs={},
        outputs={},
        sources=sources,
        facts={},
        progress=_progress,
        warn=warn,
        scratch=state.folder / "scratch" / f"{name}-outside",
        logs=state.folder / "logs",
        cache=state.config.root / "runs" / ".cache",
        digest=lambda path: state.digests.path(path)[0],
        also_read=lambda source, path: None,
    )


def _progress(what: str, total: int) -> tqdm[Any]:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(total=total, desc=what, disable=None, leave=False, file=sys.stderr)


def _restore(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, data)


def _os_words(error: OSError, root: Path) -> str:
    name = error.filename2 or error.filename  # the second is what could not be written
    file = f" ({str(name).removeprefix(f'{root}/')})" if name else ""
    return f"{error.strerror or error}{file}"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
