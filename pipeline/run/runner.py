"""Run what is stale, record it, and leave the last good state whatever happens."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from metis.backend import BackendError
from pipeline.run.attempt import Attempt, timestamp
from pipeline.run.environment import describe_environment, installed_version
from pipeline.run.errors import BusyError, ExtraMissingError, GateError, InputError, StageError
from pipeline.run.files import write_atomically
from pipeline.run.manifest import (
    SCHEMA,
    Artifact,
    ContractRecord,
    Failure,
    GateRecord,
    Manifest,
    ManifestError,
    StageRecord,
)
from pipeline.run.state import HOLDER_FILE, RunState
from preprocessing.contract import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pipeline.run.stage import Gate


#: What a user's own files can cause. Nothing was made, so the manifest stays as it was.
USER_ERRORS = (ContractError, InputError, ManifestError)

#: Failures whose message is meant for the user; all others are the machine's (OSError) or bugs.
STAGE_ERRORS = (StageError, BackendError, ExtraMissingError)

#: Less than this is left when a write failed for want of space.
FULL_DISK_BYTES = 1 << 20


class Runner:
    """Executes stages of one run folder."""

    def __init__(
        self,
        state: RunState,
        *,
        echo: Callable[[str], None] = lambda line: None,
        debug: bool = False,
    ) -> None:
        """Take over a run folder; `echo` gets a line per event, `debug` keeps what failed."""
        self.state = state
        self.config = state.config
        self.stages = state.stages
        self.folder = state.folder
        self._echo = echo
        self._debug = debug

    def run(
        self,
        names: Sequence[str],
        *,
        force: bool = False,
        allow: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Run what is stale among the selected stages, in order.

        Args:
            names: names of stages, in order.
            force: run them even if they are fresh.
            allow: gates that may say no, and the user's reason.

        Returns:
            The stages that ran.

        Raises:
            InputError: the run folder can't be written, or a stage that is not among them would
                have to run first.
            BusyError: another process works on this run.
            GateError: a gate said no, and was not allowed to.
        """
        allow = allow or {}
        states = self.state.examine()
        self.state.digests.save()
        if force or any(
            states[name].state != "fresh" or self._new_verdicts(name, allow) for name in names
        ):
            self._check_ready([n for n in names if force or states[n].state != "fresh"])
            self.state.require_inputs(names[0])
            return self._run_locked(names, force, allow)
        for name in names:  # nothing to do takes no lock and writes nothing
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
                        f"{self.state.describe_path(path)}"
                    )
            self.stages[name].ready(params)

    def _run_locked(self, names: Sequence[str], force: bool, allow: Mapping[str, str]) -> list[str]:
        ran = []
        with self._lock():
            self.state = RunState(self.config, self.stages)
            for name in names:
                state = self.state.examine()[name]
                self.state.require_inputs(name)
                if state.state == "fresh" and not force:
                    self._echo(f"{name:<10} fresh    {state.reason}")
                else:
                    self._execute(name, "forced" if state.state == "fresh" else state.reason)
                    ran.append(name)
                self._judge(name, allow)
        return ran

    @contextmanager
    def _lock(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        folder = self.state.describe_path(self.folder)
        # Not in the lock itself: some releases of filelock empty it when they try to take it.
        holder = self.folder / HOLDER_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock", timeout=0)
            lock.acquire()
            holder.write_text(f"pid {os.getpid()} since {timestamp()}\n")
        except Timeout as error:
            owner = self.state.holder() or "it just started"
            raise BusyError(
                f"{folder} is in use by another kdpipe ({owner}); wait for it, or stop it"
            ) from error
        except OSError as error:
            reason = _describe_os_error(error, self.config.root)
            raise InputError(f"can't write to {folder}: {reason}") from error
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def _execute(self, name: str, reason: str) -> None:
        attempt = Attempt(self.state, name, self._echo, keep=self._debug)
        manifest_file = self.folder / "manifest.json"
        backup = manifest_file.read_bytes() if manifest_file.exists() else None
        self._echo(f"{name:<10} runs     {reason}")
        try:
            attempt.begin(reason)
            self._save(name, attempt.record)
            record, artifacts = attempt.work()
            self._commit(name, record, artifacts)
        except KeyboardInterrupt:
            failure = Failure("Interrupted", f"{name} was interrupted")
            self._save(name, attempt.end("interrupted", failure))
            raise
        except USER_ERRORS:
            _restore(manifest_file, backup)
            self.state = RunState(self.config, self.stages)
            raise
        except Exception as error:
            meant_for_users = isinstance(error, STAGE_ERRORS)
            if meant_for_users:
                message = str(error)
            elif isinstance(error, OSError):
                message = _describe_os_error(error, self.config.root) + self._full_disk_note()
            else:
                message = f"{type(error).__name__}: {error}{self._full_disk_note()}"
            failure = Failure(type(error).__name__, message, attempt.log_line)
            with suppress(OSError):  # a full disk must not hide why we are here
                self._save(name, attempt.end("failed", failure))
            self._echo(f"{name:<10} failed   {attempt.log_line}".rstrip())
            if meant_for_users:
                raise
            raise StageError(f"{name} failed: {message}") from error
        finally:
            attempt.clean()
        for warning in record.warnings:
            self._echo(f"{'':<10} warning  {warning}")
        self._echo(f"{name:<10} done     {record.seconds:.1f} s")

    def _full_disk_note(self) -> str:
        """Which disk is full, if one is: libraries tell it in many ways, some in none."""

        def places() -> Iterator[Path]:
            yield self.folder
            yield Path(tempfile.gettempdir())

        with suppress(OSError):  # no temporary folder at all; that must not hide why we are here
            for folder in places():
                if (free := shutil.disk_usage(folder).free) < FULL_DISK_BYTES:
                    name = self.state.describe_path(folder)
                    return f"; the disk of {name} is full ({free >> 10} KiB are free), make room"
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
        created = timestamp()
        return self.state.manifest or Manifest(
            schema=SCHEMA,
            run=self.config.run,
            kdpipe=installed_version("kdpipe") or "unknown",
            created=created,
            updated=created,
        )

    def _save(self, name: str, record: StageRecord, manifest: Manifest | None = None) -> None:
        manifest = replace(
            (manifest or self._manifest()).with_stage(name, record),
            kdpipe=installed_version("kdpipe") or "unknown",
            updated=timestamp(),
            environment=describe_environment(),
        )
        manifest.save(self.folder)
        self.state.manifest = manifest

    def _judge(self, name: str, allow: Mapping[str, str]) -> None:
        """Judge a completed stage by today's limits and record it; a no ends the run."""
        record = self.state.record(name)
        verdicts = self._new_verdicts(name, allow)
        if record and verdicts:
            self._save(name, replace(record, gate=verdicts))
        self._refuse(name, allow)

    def _gates(self, name: str) -> list[Gate]:
        record = self.state.record(name)
        if record is None or not record.key:
            return []
        return self.stages[name].gates(self.config.params[name], self.state.facts_of(name))

    def _new_verdicts(self, name: str, allow: Mapping[str, str]) -> dict[str, GateRecord]:
        """The verdicts on a stage where they differ from those on record, else nothing."""
        record = self.state.record(name)
        old_verdicts = record.gate if record else {}
        verdicts = {}
        for gate in self._gates(name):
            verdict = old_verdicts.get(gate.name)
            permission = ""
            if not gate.passed and gate.name in allow:
                permission = (
                    verdict and verdict.allowed
                ) or f"{timestamp()} {allow[gate.name]}".strip()
            verdicts[gate.name] = GateRecord(gate.passed, gate.message, permission)
        return verdicts if verdicts != old_verdicts else {}

    def _refuse(self, name: str, allow: Mapping[str, str]) -> None:
        for gate in self._gates(name):
            if not gate.passed and gate.name not in allow:
                raise GateError(name, gate.name, gate.message, gate.status)
            if not gate.passed:
                self._echo(f"{name:<10} allowed  gate {gate.name}: {gate.message}")


def _restore(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, data)


def _describe_os_error(error: OSError, root: Path) -> str:
    name = error.filename2 or error.filename  # the second is what could not be written
    file = f" ({str(name).removeprefix(f'{root}/')})" if name else ""
    return f"{error.strerror or error}{file}"
