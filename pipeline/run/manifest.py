"""The manifest: the only channel between stages, and the record people read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from pipeline.artifacts import Artifacts
from pipeline.run.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path


SCHEMA = 1

F = TypeVar("F")


class ManifestError(ValueError):
    """A manifest, or an artifact it names, is not as it was left."""

    status = 3


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage made."""

    path: str  # relative to the run folder, POSIX
    sha256: str  # of a folder: of its sorted list of path, size and digest
    size_bytes: int
    stage: str


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended badly."""

    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class StageRecord:
    """What is known of one stage: its latest attempt, and its latest completed one."""

    status: str  # of the latest attempt: pending, running, ok, failed or interrupted
    reason: str = ""  # why the latest attempt ran, or how it ended
    attempts: int = 0
    attempt_key: str = ""
    started: str = ""  # UTC, RFC 3339
    finished: str = ""
    seconds: float = 0.0
    log: str = ""  # relative to the run folder
    error: Failure | None = None
    # The rest is of the latest completed attempt, and empty before there is one.
    key: str = ""
    key_parts: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    contract: str = ""  # sha256 of the preprocessing.json that was used
    inputs: dict[str, str] = field(default_factory=dict)  # artifact -> sha256
    sources: dict[str, Source] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    gate: dict[str, GateRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reproduce: str = ""  # one command line


@dataclass(frozen=True)
class Source:
    """One of the user's files: relative to the config's folder, or just a name when outside it."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class GateRecord:
    """How a gate judged, and whether the user overrode it."""

    passed: bool
    message: str
    allowed: str = ""  # when and why it was overridden


@dataclass(frozen=True)
class ContractRecord:
    """The preprocessing.json of this run."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """One run folder's record. Frozen: `with_stage` and friends give the next state."""

    schema: int
    run: str
    kdpipe: str  # version
    created: str
    updated: str
    contract: ContractRecord | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def with_stage(self, name: str, record: StageRecord) -> Manifest:
        """The manifest with this record in place."""
        return replace(self, stages={**self.stages, name: record})

    def paths(self, folder: Path) -> Artifacts:
        """Where the artifacts lie, in a run folder."""
        paths = {name: folder / artifact.path for name, artifact in self.artifacts.items()}
        return Artifacts(paths, f"artifacts of run {self.run}")

    def facts(self, stage: str, kind: type[F]) -> F:
        """What a stage reported last.

        Raises:
            ManifestError: it did not run yet, or its facts are not of this kind.
        """
        record = self.stages.get(stage)
        if record is None or not record.key:
            raise ManifestError(
                f"run {self.run} has no facts of {stage}, which did not run yet:  "
                f"kdpipe run --stage {stage}"
            )
        if problem := facts_problem(record.facts, kind):
            raise ManifestError(
                f"manifest.json: stages.{stage}.{problem}; run the stage again:  "
                f"kdpipe run --stage {stage}"
            )
        return msgspec.convert(record.facts, kind)

    def save(self, folder: Path) -> None:
        """Replace manifest.json in the run folder, all or nothing."""
        tree = msgspec.to_builtins(self)
        # A NaN would be written, and the whole manifest be no JSON any more.
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / "manifest.json", text.encode())


def facts_problem(tree: dict[str, Any], kind: type) -> str:
    """Where and why facts, as a JSON tree, are not of a kind; empty where they are."""
    try:
        msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        return f"facts{place.strip('`').removeprefix('$')}: {message[0].lower()}{message[1:]}"
    return ""


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a run folder, or None when there is none yet.

    Raises:
        ManifestError: not readable as a manifest of this schema.
    """
    path = folder / "manifest.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{path} can't be read: {error.strerror}") from error
    try:
        schema = msgspec.json.decode(data, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise ManifestError(
                f"{path} has schema {schema!r}; this kdpipe reads {SCHEMA}. "
                "Use the kdpipe that wrote it, or another run name (--run)"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise ManifestError(
            f"{path} is damaged ({error}); restore it, or start another run (--run NAME)"
        ) from error
