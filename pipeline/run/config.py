"""kdpipe.yaml to checked parameters; an unknown word is an error that names the nearest known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from pipeline.run.errors import ConfigError, nearest
from pipeline.run.parameters import Params, convert, marks, read_section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.run.stage import Stage


DEFAULT_CONFIG = "kdpipe.yaml"

#: What the generators of numpy and torch take alike.
_Seed = Annotated[int, Meta(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Config:
    """A checked kdpipe.yaml."""

    path: Path  # of the file
    run: str  # name of the run
    seed: int
    params: Mapping[str, Any]  # by stage; each a Params

    @property
    def root(self) -> Path:
        """The folder of the config file; relative names in it start here."""
        return self.path.parent

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / "runs" / self.run


def load_config(
    path: Path,
    stages: Mapping[str, Stage[Any, Any]],
    *,
    changes: Sequence[str] = (),
    run: str | None = None,
) -> Config:
    """Read kdpipe.yaml, apply `--set` changes, check every word of it.

    Args:
        path: the file.
        stages: their sections are checked against `Stage.params`.
        changes: `stage.key=value`, the value in YAML.
        run: overrides the name of the run.

    Raises:
        ConfigError: missing file, not YAML, unknown key, wrong type or value.
    """
    tree = _read_yaml(path)
    for change in changes:
        _apply(tree, change)
    name = path.name
    keys = ("run", "seed", *stages)
    for key in tree:
        if key not in keys:
            raise ConfigError(f"{name}: unknown key {key!r}{nearest(str(key), keys)}")
    sections = {stage: tree.get(stage) or {} for stage in stages}
    run_name = _run_name(run if run is not None else tree.get("run", "default"), name)
    seed: int = convert(tree.get("seed", 0), _Seed, "seed", name)
    params = {
        stage: read_section(section, stages[stage].params, stage, name)
        for stage, section in sections.items()
    }
    root = path.absolute().parent
    params = {stage: _locate_programs(section, root) for stage, section in params.items()}
    return Config(
        path=path.absolute(),
        run=run_name,
        seed=seed,
        params={stage: _fill(section, params) for stage, section in params.items()},
    )


def _locate_programs(section: Params, root: Path) -> Params:
    """Make the paths of programs absolute; relative ones start at the config's folder."""
    programs = {
        name: str(root / Path(program).expanduser())
        for name, notes in marks(type(section)).items()
        if "program" in notes and (program := getattr(section, name))
    }
    return replace(section, **programs)


def _fill(section: Params, params: Mapping[str, Params]) -> Params:
    """Give parameters that were left null the value of the one they are the same as."""
    values = {}
    for name, notes in marks(type(section)).items():
        if "same_as" in notes and getattr(section, name) is None:
            stage, _, key = notes["same_as"].partition(".")
            values[name] = getattr(params[stage], key)
    return replace(section, **values)


def _run_name(name: object, file: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"{file}: run is {name!r}; a run's name has letters, digits, '.', '_' and '-'"
        )
    return name


def _loader(place: str) -> Any:  # noqa: ANN401 - a class of PyYAML
    """YAML without two of its traps: repeated keys, and 1e-3 read as a word."""
    import yaml  # only here: commands without a config don't pay for it

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in keys:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{place}: key {key!r} appears twice (line {line})")
            keys.add(key)
        return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
    return Loader


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        # A SafeLoader: it builds plain values only.
        tree = yaml.load(path.read_text(), _loader(path.name))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; `kdpipe init FOLDER` writes one, -c names another"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{path.name} is not YAML: {message}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name} must be a mapping of sections")
    return tree


def _apply(tree: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change!r}: write stage.key=value")
    try:
        value = yaml.load(text, _loader(f"--set {key}"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        else:
            raise ConfigError(f"--set {change!r}: {parent!r} has no keys below it")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {change!r}: there is no {last!r} to set")
