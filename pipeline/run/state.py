"""What is stale in a run folder, and why, in words."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifacts
from pipeline.facts import RunFacts
from pipeline.run.digests import Digests
from pipeline.run.environment import installed_version
from pipeline.run.errors import InputError
from pipeline.run.manifest import ManifestError, facts_problem, load_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pipeline.run.config import Config
    from pipeline.run.manifest import Artifact, Manifest, StageRecord
    from pipeline.run.stage import Stage


#: Beside a run's lock: which process holds it.
HOLDER_FILE = "lock.holder"

#: Digest of a source that is not there.
ABSENT = "missing"


@dataclass(frozen=True)
class Difference:
    """One reason why a stage is stale."""

    what: str
    old: Any
    new: Any
    tool: bool = False  # only the version of a tool

    def __str__(self) -> str:
        return f"{self.what} was {_show_value(self.old)}, now {_show_value(self.new)}"


@dataclass(frozen=True)
class Examination:
    """The state of one stage, and why."""

    stage: str
    state: str  # fresh, stale, missing, running, failed or interrupted
    reason: str
    differences: tuple[Difference, ...] = ()
    #: Its artifacts may feed a stage that runs alone: nothing but tool versions differs, here and
    #: upstream. A student trained on a server stays the student on a box with other releases.
    usable: bool = False
    #: The reason, where it is an earlier stage's: the first that is not fresh.
    cause: str = ""


class RunState:
    """A run folder as it lies on disk, beside the config it should follow. Writes nothing."""

    def __init__(self, config: Config, stages: Mapping[str, Stage[Any, Any]]) -> None:
        self.config = config
        self.stages = stages
        self.folder = config.folder
        self.digests = Digests(config.root / "runs" / ".digests.json")
        self.manifest: Manifest | None = load_manifest(self.folder)
        self.maker = {output: name for name, s in stages.items() for output in s.outputs}

    def record(self, stage: str) -> StageRecord | None:
        """What the manifest says of a stage."""
        return self.manifest.stages.get(stage) if self.manifest else None

    def artifact(self, name: str) -> Artifact | None:
        """What the manifest says of an artifact."""
        return self.manifest.artifacts.get(name) if self.manifest else None

    @property
    def paths(self) -> Artifacts:
        """Where the artifacts lie that the manifest names."""
        if self.manifest is None:
            return Artifacts({}, f"artifacts of run {self.config.run}")
        return self.manifest.paths(self.folder)

    @property
    def facts(self) -> RunFacts:
        """What the stages reported; a stage without facts raises ManifestError when it is asked."""
        return RunFacts(self.facts_of)

    def facts_of(self, stage: str) -> Any:  # noqa: ANN401 - of the kind that the stage declares
        """What a stage reported last. See `Manifest.facts`."""
        if stage not in self.stages:
            raise LookupError(f"{stage} is not among the stages ({', '.join(self.stages)})")
        if self.manifest is None:
            raise ManifestError(f"run {self.config.run} has no manifest yet:  kdpipe run")
        return self.manifest.facts(stage, self.stages[stage].facts)

    def require_inputs(self, stage: str) -> None:
        """Refuse a stage whose inputs are missing, stale or damaged.

        Raises:
            InputError: an input is missing, or the stage that makes it would have to run again.
            ManifestError: an input was changed since it was made.
        """
        states = self.examine()
        for name in self.stages[stage].inputs:
            maker = self.maker[name]
            cure = f"  {maker} makes it:  kdpipe run --stage {maker}"
            if self.artifact(name) is None:
                manifest = self.describe_path(self.folder / "manifest.json")
                raise InputError(f"{stage} needs {name!r}, which {manifest} does not have.\n{cure}")
            if problem := self.damage(name):
                raise ManifestError(f"{problem}.\n{cure}")
            if not states[maker].usable:
                raise InputError(
                    f"{stage} needs {name!r}, but {maker} is {states[maker].state}: "
                    f"{states[maker].reason}.\n{cure}"
                )

    def examine(self) -> dict[str, Examination]:
        """The state of every stage, in order."""
        result: dict[str, Examination] = {}
        for name in self.stages:
            result[name] = self._examine(name, result)
        return result

    def _examine(self, name: str, earlier: Mapping[str, Examination]) -> Examination:
        record = self.record(name)
        if record is None:
            return Examination(name, "missing", "it never ran")
        if record.status == "running":
            if holder := self.holder():
                return Examination(name, "running", f"it runs now ({holder})")
            return Examination(name, "interrupted", "its last attempt was killed")
        parts = self.key_parts(name)
        makers = [earlier[self.maker[artifact]] for artifact in self.stages[name].inputs]
        if record.status != "ok" and (not record.key or record.attempt_key == key_of(parts)):
            return Examination(name, record.status, record.reason)
        differences = tuple(self._differences(record, parts))
        if differences:
            reason = "; ".join(str(d) for d in differences)
            usable = all(d.tool for d in differences) and all(m.usable for m in makers)
            return Examination(name, "stale", reason, differences, usable)
        if problem := self._problem(name, record):
            return Examination(name, "stale", problem)
        for maker in makers:
            if maker.state != "fresh":
                reason = f"{maker.stage} comes first and is {maker.state}: {maker.reason}"
                cause = maker.cause or reason
                usable = all(m.usable for m in makers)
                return Examination(name, "stale", cause, usable=usable, cause=cause)
        return Examination(name, "fresh", f"made {record.finished}", usable=True)

    def _problem(self, name: str, record: StageRecord) -> str:
        """What is wrong with what a completed attempt left, if anything."""
        if problem := facts_problem(record.facts, self.stages[name].facts):
            return f"another kdpipe wrote its record: {problem}"
        return next(filter(None, map(self.damage, record.outputs)), "")

    def holder(self) -> str:
        """The other process that works on the run folder now, `pid N since TIME`, or nothing."""
        try:
            text = (self.folder / HOLDER_FILE).read_text().strip()
            pid = int(text.split()[1])
            os.kill(pid, 0)
        except (OSError, IndexError, ValueError):
            return ""
        return "" if pid == os.getpid() else text

    def damage(self, artifact: str, *, fresh: bool = False) -> str:
        """What is wrong with an artifact on disk; `fresh` trusts no remembered digest."""
        record = self.artifact(artifact)
        if record is None:
            return f"artifact {artifact} is not in the manifest"
        try:
            digest, _ = self.digests.path(self.folder / record.path, fresh=fresh)
        except OSError as error:
            return f"artifact {artifact} ({record.path}) can't be read: {error.strerror}"
        if digest == record.sha256:
            return ""
        return (
            f"artifact {artifact} ({record.path}) was changed: expected {record.sha256}, "
            f"found {digest}"
        )

    def key_parts(self, stage: str) -> dict[str, Any]:
        """Everything that decides what a stage makes, as a JSON tree."""
        definition = self.stages[stage]
        inputs = {name: self.artifact(name) for name in definition.inputs}
        return {
            "stage": stage,
            "code_version": definition.code_version,
            "seed": self.config.seed,
            "contract": self.contract_digest(),
            "params": self.config.params[stage].key_tree(),
            "sources": {
                name: self._source_digest(stage, name, path)
                for name, path in self.sources(stage).items()
            },
            "inputs": {
                name: artifact.sha256 if artifact else ABSENT for name, artifact in inputs.items()
            },
            "versions": self.versions(stage),
        }

    def sources(self, stage: str) -> dict[str, Path]:
        """The user's files that a stage reads: those its parameters name, and those it found."""
        sources = self.stages[stage].sources(self.config.params[stage], self.config.root)
        record = self.record(stage)
        for name in record.sources if record else ():
            owner, _, file = name.partition("+")
            if file and owner in sources:
                sources[name] = sources[owner].parent / file
        return sources

    def describe_path(self, path: Path) -> str:
        """A path as records and messages show it: relative to the config, or just its name."""
        try:
            return path.absolute().relative_to(self.config.root).as_posix()
        except ValueError:
            return path.name

    def contract_digest(self) -> str:
        """Digest of the user's preprocessing.json; of the run's copy where that is not here."""
        maker = self.maker.get("contract")
        if maker is None:
            return ""
        return self._source_digest(maker, "contract", self.sources(maker)["contract"])

    def versions(self, stage: str) -> dict[str, str]:
        """Installed versions of a stage's tools; where one is not installed, the recorded one.

        What is not here can't have changed anything: the box with the card has no torch.
        """
        record = self.record(stage)
        old = record.versions if record else {}
        tools = self.stages[stage].tools(self.config.params[stage])
        if not isinstance(tools, dict):
            tools = {tool: installed_version(tool) for tool in tools}
        versions = {tool: version or old.get(tool) for tool, version in tools.items()}
        return {tool: version for tool, version in versions.items() if version}

    def _source_digest(self, stage: str, name: str, path: Path) -> str:
        try:
            return self.digests.path(path)[0]
        except OSError:
            # The box with the card gets the run folder, not the 52 GB beside it: what can't be
            # looked at counts as unchanged, as long as it is still called the same.
            record = self.record(stage)
            source = record.sources.get(name) if record else None
            return source.sha256 if source and source.path == self.describe_path(path) else ABSENT

    def _differences(self, record: StageRecord, parts: Mapping[str, Any]) -> Iterator[Difference]:
        old = record.key_parts
        for part in ("contract", "sources", "params", "inputs", "seed", "versions", "code_version"):
            for path, old_value, new_value in _compare(old.get(part), parts[part]):
                name = path.removeprefix(".")
                if part == "sources" and name == "contract":
                    continue  # said by the part of that name
                yield Difference(
                    self._name(record, part, name), old_value, new_value, tool=part == "versions"
                )

    def _name(self, record: StageRecord, part: str, name: str) -> str:
        if part == "contract":
            maker = self.maker["contract"]
            return self.describe_path(self.sources(maker)["contract"])
        if part == "sources":
            source = record.sources.get(name)
            return f"{source.path} ({name})" if source else f"source {name}"
        if part == "inputs":
            return f"input {name}"
        if part == "code_version":
            return "kdpipe's code for this stage"
        return name or part


def key_of(parts: Mapping[str, Any]) -> str:
    """The cache key: sha256 of canonical JSON (sorted keys, UTF-8, shortest floats)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def _compare(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401
    """Where two JSON trees differ: path, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _compare(old.get(key), new.get(key), f"{path}.{key}")
    elif (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and any(isinstance(item, dict) for item in new)
    ):
        for i, (old_value, new_value) in enumerate(zip(old, new, strict=True)):
            yield from _compare(old_value, new_value, f"{path}[{i}]")
    elif old != new:
        yield path, old, new


def _show_value(value: Any) -> str:  # noqa: ANN401 - a JSON tree
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 64 else text[:61] + "..."
