"""What a stage is, what it is given, and how the stages are found and ordered."""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.run.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tqdm import tqdm

    from pipeline.artifacts import Artifacts
    from pipeline.facts import RunFacts


P = TypeVar("P")  # parameters
F = TypeVar("F")  # facts


@dataclass(frozen=True)
class Gate:
    """A yes or no about a stage's facts. A no is a result, not an accident: the artifacts stay."""

    name: str
    passed: bool
    message: str  # the value, the limit, and what to do about it
    status: int = 4  # exit status of a no


@dataclass(frozen=True)
class Job:
    """Everything a stage function may touch."""

    run: str  # name of the run
    seed: int
    folder: Path  # of the run
    inputs: Artifacts  # of earlier stages, verified: those that `Stage.inputs` names
    outputs: Artifacts  # where to write: those that `Stage.outputs` names
    sources: Mapping[str, Path]  # the user's files, as `Stage.sources` named them
    facts: RunFacts  # of the earlier stages
    progress: Callable[[str, int], tqdm[Any]]  # (what, how many) -> a bar with update(n), a context
    warn: Callable[[str], None]  # tell the user and the record
    scratch: Path  # of this stage with these inputs: what a killed attempt left is there again
    logs: Path  # folder for logs of any form
    cache: Path  # folder for copies that can be made again; shared by the runs of a project
    digest: Callable[[Path], str]  # sha256 of a source
    also_read: Callable[[str, Path], None]  # (source, file beside it): found only while working


@dataclass(frozen=True)
class Stage(Generic[P, F]):
    """One step of a run; every file in pipeline/stages/ defines one as `STAGE`."""

    inputs: tuple[str, ...]  # names of artifacts
    outputs: Mapping[str, str]  # name of an artifact -> name of its file or folder
    params: type[P]  # the section of kdpipe.yaml
    facts: type[F]  # what it reports: anything that msgspec writes as JSON and reads back
    run: Callable[[Job, P], F]
    sources: Callable[[P, Path], dict[str, Path]] = lambda params, root: {}
    gates: Callable[[P, F], list[Gate]] = lambda params, facts: []
    gate_names: tuple[str, ...] = ()  # of all that `gates` may give
    ready: Callable[[P], None] = lambda params: None  # raises at once what would fail hours later
    #: Distributions whose versions change the outputs; with their versions where those are not the
    #: ones installed beside kdpipe.
    tools: Callable[[P], tuple[str, ...] | dict[str, str | None]] = lambda params: ()
    code_version: int = 1  # raised by hand when the stage's outputs change for equal inputs


def order_stages(stages: Mapping[str, Stage[Any, Any]]) -> dict[str, Stage[Any, Any]]:
    """The same stages, each after the stages that make its inputs. See `load_stages`."""
    maker: dict[str, str] = {}
    for name, stage in stages.items():
        for output in stage.outputs:
            if output in maker:
                raise StageError(f"{maker[output]} and {name} both make {output!r}")
            maker[output] = name
    graph: dict[str, set[str]] = {}
    for name, stage in stages.items():
        for artifact in stage.inputs:
            if artifact not in maker:
                raise StageError(f"{name} needs {artifact!r}, which no stage makes")
        graph[name] = {maker[artifact] for artifact in stage.inputs}
    try:
        order = TopologicalSorter(graph).static_order()
        return {name: stages[name] for name in order}
    except CycleError as error:
        raise StageError(f"stages wait for each other: {' -> '.join(error.args[1])}") from error
