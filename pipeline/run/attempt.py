"""One attempt at one stage: its job, its folder, its log, what it leaves behind."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.artifacts import Artifacts
from pipeline.run.digests import LISTING_SUFFIX
from pipeline.run.errors import InputError, StageError
from pipeline.run.files import folder_files, sync_folder
from pipeline.run.manifest import (
    Artifact,
    Failure,
    ManifestError,
    Source,
    StageRecord,
    facts_problem,
)
from pipeline.run.stage import Job
from pipeline.run.state import RunState, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tqdm import tqdm


#: Free disk space to keep beyond what the last run of a stage needed.
SPARE_BYTES = 64 << 20


class Attempt:
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
    def log_line(self) -> str:
        """Where the log is; nothing where the attempt ended before it had one."""
        return f"log: {self._state.describe_path(self._log)}" if self._log.exists() else ""

    def begin(self, reason: str) -> None:
        """Claim the partial folder and the log."""
        record = self._state.record(self._name) or self.record
        self._check_space(record)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._log.parent.mkdir(exist_ok=True)
        self._log.touch()
        self.record = replace(
            record,
            status="running",
            reason=reason,
            attempts=record.attempts + 1,
            attempt_key=key_of(self._state.key_parts(self._name)),
            started=timestamp(),
            finished="",
            seconds=0.0,
            log=self._log.relative_to(self._state.folder).as_posix(),
            error=None,
        )

    def work(self) -> tuple[StageRecord, dict[str, Artifact]]:
        """Run the stage function; check, digest and publish what it made."""
        parts = self._state.key_parts(self._name)
        inputs = {}
        for name in self._stage.inputs:
            artifact = self._state.artifact(name)
            assert artifact is not None, name
            inputs[name] = self._state.folder / artifact.path
        outputs = {n: self._partial / file for n, file in self._stage.outputs.items()}
        job = replace(
            _bare_job(self._state, self._name, self._warnings.append),
            inputs=Artifacts(inputs, f"inputs of {self._name}"),
            outputs=Artifacts(outputs, f"outputs of {self._name}"),
            facts=self._state.facts,
            scratch=self._scratch(key_of(parts)),
            logs=self._log.with_suffix(""),
            also_read=self._also_read,
        )
        with self._logging():
            facts = self._facts_tree(self._stage.run(job, self._params))
        self._check_unchanged(parts)
        artifacts = self._publish()
        parts = self._state.key_parts(self._name)
        sources = {**job.sources, **self._found}
        parts["sources"] = {n: self._state.digests.path(p)[0] for n, p in sources.items()}
        record = replace(
            self.record,
            status="ok",
            finished=timestamp(),
            seconds=round(time.monotonic() - self._clock, 3),
            key=key_of(parts),
            attempt_key=key_of(parts),
            key_parts=parts,
            params=parts["params"],
            seed=parts["seed"],
            contract=parts["contract"],
            inputs=parts["inputs"],
            sources={
                n: Source(self._state.describe_path(p), *self._state.digests.path(p))
                for n, p in sources.items()
            },
            outputs=list(artifacts),
            facts=facts,
            warnings=self._warnings,
            gate={},
            versions=parts["versions"],
            reproduce=f"kdpipe run --stage {self._name} --force",
        )
        return record, artifacts

    def end(self, status: str, failure: Failure) -> StageRecord:
        """The record of an attempt that made nothing."""
        return replace(
            self.record,
            status=status,
            reason=failure.message,
            finished=timestamp(),
            seconds=round(time.monotonic() - self._clock, 3),
            error=failure,
        )

    def clean(self) -> None:
        """Remove what is half written; with --debug it stays until the next attempt."""
        if not self._keep:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _facts_tree(self, facts: object) -> dict[str, Any]:
        """Facts as a JSON tree, proven to be read back: types of values are not checked before."""
        tree: dict[str, Any] = msgspec.to_builtins(facts)
        if problem := facts_problem(tree, self._stage.facts):
            raise TypeError(f"{self._name} reports what its own type refuses: {problem}")
        return tree

    def _scratch(self, key: str) -> Path:
        """Where this stage finds what a killed attempt with the same inputs left, and no other."""
        folder = self._state.folder / "scratch" / f"{self._name}-{key[:16]}"
        for path in folder.parent.glob(f"{self._name}-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        return folder

    def _also_read(self, source: str, path: Path) -> None:
        folder = self._stage.sources(self._params, self._state.config.root)[source].parent
        self._found[f"{source}+{path.relative_to(folder).as_posix()}"] = path

    def _check_unchanged(self, old_parts: Mapping[str, Any]) -> None:
        parts = self._state.key_parts(self._name)
        for name, digest in old_parts["sources"].items():
            if parts["sources"][name] != digest:
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

    def _check_space(self, record: StageRecord) -> None:
        artifacts = [self._state.artifact(name) for name in record.outputs]
        size = sum(artifact.size_bytes for artifact in artifacts if artifact) + SPARE_BYTES
        free = shutil.disk_usage(self._state.folder).free
        if free < size:
            raise StageError(
                f"{self._name} needs about {size >> 20} MiB of disk space and {free >> 20} MiB are "
                f"free in {self._state.describe_path(self._state.folder)}; make room"
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


def _bare_job(state: RunState, name: str, warn: Callable[[str], None]) -> Job:
    """The job of a stage without artifacts to read and without a place to write to."""
    config = state.config
    return Job(
        run=config.run,
        seed=config.seed,
        folder=state.folder,
        inputs=Artifacts({}, "inputs of work outside a run"),
        outputs=Artifacts({}, "outputs of work outside a run"),
        sources=state.stages[name].sources(config.params[name], config.root),
        facts=state.facts,
        progress=progress_bar,
        warn=warn,
        scratch=state.folder / "scratch" / f"{name}-outside",
        logs=state.folder / "logs",
        cache=config.root / "runs" / ".cache",
        digest=lambda path: state.digests.path(path)[0],
        also_read=lambda source, path: None,
    )


@contextmanager
def job_outside_a_run(state: RunState, name: str, warn: Callable[[str], None]) -> Iterator[Job]:
    """The job of a stage for work that only fills caches; remembers digests when the block ends.

    Raises:
        InputError: a source is missing, or the stage is not ready for another reason.
    """
    job = _bare_job(state, name, warn)
    for source, path in job.sources.items():
        if not path.exists():
            raise InputError(f"source {source} of {name} is missing: {state.describe_path(path)}")
    state.stages[name].ready(state.config.params[name])
    yield job
    state.digests.save()


def progress_bar(title: str, total: int) -> tqdm[Any]:
    """A bar on stderr; nothing where that is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, disable=None, leave=False, file=sys.stderr)


def timestamp() -> str:
    """Now, UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
