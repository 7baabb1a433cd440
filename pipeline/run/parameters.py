"""What the sections of kdpipe.yaml are made of, and how they are read from its YAML."""

from __future__ import annotations

import re
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from pipeline.run.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable


#: Marks a parameter that names a file: its digest counts for staleness, its name does not.
PATH = Meta(extra={"path": True})

#: Marks a parameter that does not change what the stage makes, such as a gate's limit.
UNKEYED = Meta(extra={"unkeyed": True})

#: Marks a parameter that a later release added: left at its default it is not keyed, so that what
#: was made before it stays fresh.
ADDED = Meta(extra={"added": True})


#: Marks the path of a program; not keyed, for its version says what changed, not where it lies.
PROGRAM = Meta(extra={"program": True, "unkeyed": True})


def same_as(parameter: str) -> Meta:
    """Marks a parameter that, left null, takes the value of `stage.key`."""
    return Meta(extra={"same_as": parameter})


def one_of(names: Iterable[str]) -> Meta:
    """Marks a word that must be a name of a table."""
    names = tuple(names)
    return Meta(pattern=rf"\A(?:{'|'.join(map(re.escape, names))})\Z", extra={"one_of": names})


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A section of kdpipe.yaml, or a mapping inside one. Marks are notes on its annotations."""

    @classmethod
    def translate(cls, section: dict[str, Any]) -> dict[str, Any]:
        """The section as YAML gave it, with the keys of earlier releases in today's spelling.

        Raises:
            ConfigError: an old key that can't be read; says the new spelling.
        """
        return section

    def key_tree(self) -> dict[str, Any]:
        """What decides what a stage makes, as a JSON tree: no file names, no limits."""
        defaults = {field.name: field.default for field in msgspec.structs.fields(type(self))}
        return {
            name: _tree(getattr(self, name))
            for name, note in marks(type(self)).items()
            if not note.keys() & {"path", "unkeyed"}
            and not ("added" in note and getattr(self, name) == defaults[name])
        }


P = TypeVar("P", bound=Params)


@cache
def marks(kind: type[Params]) -> dict[str, dict[str, Any]]:
    """By parameter, what its marks say."""
    return {
        field.name: {
            key: value
            for mark in getattr(field.type, "__metadata__", ())
            for key, value in (mark.extra or {}).items()
        }
        for field in msgspec.structs.fields(kind)
    }


def _tree(value: Any) -> Any:  # noqa: ANN401 - a JSON tree
    if isinstance(value, Params):
        return value.key_tree()
    if isinstance(value, dict):
        return {str(key): _tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tree(inner) for inner in value]
    return value


def read_section(section: Any, kind: type[P], name: str, file: str) -> P:  # noqa: ANN401 - YAML
    """Check a section of kdpipe.yaml.

    Args:
        section: as YAML gave it.
        kind: its type.
        name: of the section.
        file: of the config.

    Raises:
        ConfigError: an unknown key, a wrong type or value; says which, by its path, and what is
            near or right.
    """
    if isinstance(section, dict):
        try:
            section = kind.translate(section)
        except ConfigError as error:
            raise ConfigError(f"{file}: {name}.{error}") from error
    return convert(section, kind, name, file)


T = TypeVar("T")


def convert(value: Any, kind: type[T] | Any, name: str, file: str) -> T:  # noqa: ANN401 - YAML
    """A value of YAML as a type; see `read_section`."""
    try:
        result: T = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        place = _Place(value, kind, name)
        place.follow(path.strip("`").removeprefix("$"))
        raise ConfigError(f"{file}: {place.explain(message)}") from error
    return result


class _Place:
    """A place in a tree of YAML, beside the type that should be there."""

    def __init__(self, value: Any, kind: Any, name: str) -> None:  # noqa: ANN401 - YAML and a type
        self._value = value
        self._options = _options(kind)
        self._name = name

    def follow(self, path: str) -> None:
        """Go down a path of msgspec, such as `.teachers[0].zscore`; `[...]` is any key."""
        for key, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
            if key:
                self._down(key, f".{key}", self._fields().get(key, ()))
            elif index == "...":
                self._down_to_the_wrong_item()
            else:
                kinds = [get_args(o) for o in self._options if get_origin(o) in (tuple, list)]
                number = min(int(index), len(kinds[0]) - 1)
                kind = kinds[0][0] if kinds[0][-1] is Ellipsis else kinds[0][number]
                self._down(int(index), f"[{index}]", _options(kind))

    def _down(self, key: str | int, name: str, options: tuple[Any, ...]) -> None:
        self._value = self._value[key]
        self._name += name
        self._options = options

    def _down_to_the_wrong_item(self) -> None:
        """Into the first value of a mapping that does not fit: msgspec does not tell its key."""
        kind = next(get_args(o)[1] for o in self._options if get_origin(o) is dict)
        for key, value in self._value.items():
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError:
                self._down(key, f".{key}", _options(kind))
                return

    def _structs(self) -> list[type[Params]]:
        return [o for o in self._options if isinstance(o, type) and issubclass(o, Params)]

    def _fields(self) -> dict[str, tuple[Any, ...]]:
        """The keys that may stand here, and the types of their values."""
        structs = self._structs()
        kinds: dict[str, tuple[Any, ...]] = {}
        for struct in structs:
            config = struct.__struct_config__
            if config.tag is None or self._value.get(config.tag_field) == config.tag:
                kinds.update({f.name: _options(f.type) for f in msgspec.structs.fields(struct)})
            if config.tag_field is not None:
                tags = tuple(s.__struct_config__.tag for s in structs)
                kinds[config.tag_field] = (Literal[tags],)
        return kinds

    def _words(self) -> list[str]:
        """The words that may stand here."""
        literals = [get_args(option) for option in self._options if get_origin(option) is Literal]
        return [str(word) for words in literals for word in words]

    def explain(self, message: str) -> str:
        """The message of msgspec, with the place, and the nearest right word."""
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", message):
            keys = nearest(unknown[1], self._fields())
            return f"unknown key '{self._name}.{unknown[1]}'{keys}"
        if re.match(r"Invalid (enum )?value '|Expected `str` matching regex", message):
            words = nearest(str(self._value), self._words())
            return f"{self._name}: invalid enum value {self._value!r}{words}"
        return f"{self._name}: {message[0].lower()}{message[1:]}"


def _options(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type
    """The members of a union without their marks, or the type alone; `one_of` as Literal."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        words = [mark.extra["one_of"] for mark in notes if "one_of" in (mark.extra or {})]
        return (Literal[words[0]],) if words else _options(inner)
    if get_origin(kind) in (Union, UnionType):
        return tuple(option for member in get_args(kind) for option in _options(member))
    return (kind,)
