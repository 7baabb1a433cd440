"""preprocessing.json, the contract between teachers, student and device: read, checked, digested.

Standard library only: this file also travels to the device.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


#: Grey levels of the 8-bit image that the device receives.
GREY_MAX = 255

INTERPOLATIONS = ("nearest", "bilinear")


class ContractError(ValueError):
    """A preprocessing.json, or a request made of it, that can't be honoured."""

    status = 3


@dataclass(frozen=True)
class Scaling:
    """How the stored values of one modality become contract units: the affine map src -> dst.

    `linear` extends beyond src_range; `clip_linear` clips the stored values to it first.
    """

    type: str  # "linear" or "clip_linear"
    src_range: tuple[float, float]  # stored values; the clip range for clip_linear
    dst_range: tuple[float, float]  # contract units

    @property
    def gain(self) -> float:
        """Contract units per stored unit."""
        return (self.dst_range[1] - self.dst_range[0]) / (self.src_range[1] - self.src_range[0])

    @property
    def offset(self) -> float:
        """Contract value of the stored value 0."""
        return self.dst_range[0] - self.src_range[0] * self.gain


@dataclass(frozen=True)
class ZScore:
    """Mean and standard deviation per band, in contract units (after scaling)."""

    mu: tuple[float, ...]
    sigma: tuple[float, ...]

    def take(self, bands: Sequence[int]) -> ZScore:
        """The entries of these bands, in this order."""
        return ZScore(tuple(self.mu[b] for b in bands), tuple(self.sigma[b] for b in bands))


@dataclass(frozen=True)
class Channels:
    """Some bands of the data as the contract has them; `Contract.bind` makes it.

    Who holds one needs neither the contract nor the number of bands in the data.
    """

    modality: str
    bands: tuple[int, ...]  # zero-based, in the order in which a model sees them
    scaling: Scaling
    entries: ZScore | None  # of all bands of the modality; None when z-scoring is off

    @property
    def zscore(self) -> ZScore | None:
        """The z-score of exactly these bands, in their order; None when z-scoring is off."""
        return self.entries.take(self.bands) if self.entries else None

    def take(self, bands: Sequence[int]) -> Channels:
        """Other bands of the same modality."""
        return replace(self, bands=tuple(bands))

    def without_zscore(self) -> Channels:
        """The same bands, scaled only."""
        return replace(self, entries=None)


@dataclass(frozen=True)
class Contract:
    """What preprocessing.json says. The file's bytes stay the truth; this is a view of them."""

    layout: str  # of the teachers' input: "NCHW" or "NHWC"
    dtype: str  # of the teachers' input: "float32" or "float16"
    shape: tuple[int, int, int, int]  # of the teachers' input, in `layout`
    scaling: Mapping[str, Scaling]  # by modality
    zscore: Mapping[str, ZScore]  # by modality; the key "" holds a list that is not keyed
    zscore_enabled: bool
    labels: tuple[str, ...]  # class names; the index is the class
    sha256: str  # of the file's bytes
    size_bytes: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the teachers' input."""
        return (
            (self.shape[2], self.shape[3])
            if self.layout == "NCHW"
            else (self.shape[1], self.shape[2])
        )

    def scaling_of(self, modality: str) -> Scaling:
        """The scaling of one modality.

        Raises:
            ContractError: the contract does not know the modality.
        """
        if modality not in self.scaling:
            raise ContractError(
                f"preprocessing.json: scaling has no modality {modality!r}; "
                f"it has {', '.join(self.scaling)}"
            )
        return self.scaling[modality]

    def bind(self, modality: str, bands: Sequence[int], bands_in_data: int) -> Channels:
        """Bind the contract to data: how these bands of a modality are scaled and z-scored.

        Args:
            modality: key of `scaling`.
            bands: zero-based band indices in the order in which the model sees them.
            bands_in_data: how many bands the modality has in the data; mu and sigma must have as
                many entries, whatever the model sees.

        Raises:
            ContractError: no entry for the modality, another number of entries, band out of range.
        """
        scaling = self.scaling_of(modality)
        for band in bands:
            if not 0 <= band < bands_in_data:
                raise ContractError(
                    f"band {band} does not exist: modality {modality!r} has bands 0 to "
                    f"{bands_in_data - 1}"
                )
        if not self.zscore_enabled:
            return Channels(modality, tuple(bands), scaling, None)
        keyed = modality in self.zscore
        if not keyed and "" not in self.zscore:
            raise ContractError(
                f"preprocessing.json: zscore has no entry for modality {modality!r}; "
                f"it has {', '.join(self.zscore)}"
            )
        where = f"zscore.{modality}.mu" if keyed else "zscore.mu"
        entries = self.zscore[modality if keyed else ""]
        if len(entries.mu) != bands_in_data:
            raise ContractError(
                f"preprocessing.json: {where} has {len(entries.mu)} entries, but modality "
                f"{modality!r} has {bands_in_data} bands in the data; give one entry per band"
                + ("" if keyed else f", or key zscore per modality (zscore.{modality}.mu)")
            )
        return Channels(modality, tuple(bands), scaling, entries)


def load_contract(path: Path) -> Contract:
    """Read and check preprocessing.json.

    Raises:
        ContractError: missing or unreadable file, not JSON, or a value that can't be right; the
            message names the file and the JSON path.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(
            f"{path}: can't read the preprocessing contract: {error.strerror}"
        ) from error
    return parse_contract(data, name=path.name)


def parse_contract(data: bytes, *, name: str = "preprocessing.json") -> Contract:
    """Check the bytes of a preprocessing.json; `name` is what messages call the file.

    Raises:
        ContractError: see `load_contract`.
    """
    read = _Reader(name)
    root = read.document(data)
    tensor = read.mapping(root, "input")
    layout = read.choice(tensor, "input.layout", ("NCHW", "NHWC"))
    dtype = read.choice(tensor, "input.dtype", ("float32", "float16"))
    shape = read.shape(tensor, "input.shape")
    scaling = {
        modality: read.scaling(entry, f"scaling.{modality}")
        for modality, entry in read.mapping(root, "scaling").items()
    }
    if not scaling:
        read.refuse("scaling", "has no modality; name at least one, such as optical")
    enabled, zscore = _zscores(read, root, scaling)
    labels = read.labels(root, "labels")
    return Contract(
        layout=layout,
        dtype=dtype,
        shape=shape,
        scaling=scaling,
        zscore=zscore,
        zscore_enabled=enabled,
        labels=labels,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
    )


def _zscores(
    read: _Reader, root: Mapping[str, Any], scaling: Mapping[str, Scaling]
) -> tuple[bool, dict[str, ZScore]]:
    entry = read.mapping(root, "zscore")
    enabled = read.flag(entry, "zscore.enabled")
    if not enabled:
        return False, {}
    if "mu" in entry or "sigma" in entry:
        ranges = {s.dst_range for s in scaling.values()}
        # Which modality an unkeyed list belongs to is decided by its length, when it is used; its
        # values can only be compared with a range that all modalities share.
        return True, {"": read.zscore(entry, "zscore", ranges.pop() if len(ranges) == 1 else None)}
    zscores = {
        modality: read.zscore(
            read.mapping(entry, f"zscore.{modality}"), f"zscore.{modality}", scale.dst_range
        )
        for modality, scale in scaling.items()
        if modality in entry
    }
    if not zscores:
        read.refuse(
            "zscore",
            "is enabled but has neither mu and sigma nor a modality of scaling "
            f"({', '.join(scaling)})",
        )
    return True, zscores


class _Reader:
    """Typed look-ups whose refusals name the file and the JSON path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuse(self, path: str, what: str) -> None:
        raise ContractError(f"{self.name}: {path} {what}")

    def document(self, data: bytes) -> Mapping[str, Any]:
        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            result: dict[str, Any] = {}
            for key, value in pairs:
                if key in result:
                    raise ContractError(f"{self.name}: key {key!r} appears twice in one object")
                result[key] = value
            return result

        def no_constants(word: str) -> None:
            raise ContractError(f"{self.name}: {word} is not a number; every value must be finite")

        try:
            root = json.loads(
                data.decode("utf-8-sig"),  # Windows editors and MATLAB may write a byte-order mark
                object_pairs_hook=no_duplicates,
                parse_constant=no_constants,
            )
        except UnicodeDecodeError as error:
            raise ContractError(f"{self.name} is not UTF-8 text (byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ContractError(
                f"{self.name} is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
            ) from error
        if not isinstance(root, dict):
            raise ContractError(f"{self.name} must be a JSON object, not {_kind(root)}")
        return root

    def value(self, entry: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 - JSON is untyped
        key = path.rsplit(".", 1)[-1]
        if key not in entry:
            raise ContractError(f"{self.name}: {path} is missing")
        return entry[key]

    def mapping(self, entry: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        value = self.value(entry, path)
        if not isinstance(value, dict):
            self.refuse(path, f"must be an object, not {_kind(value)}")
        return value  # type: ignore[no-any-return]

    def choice(self, entry: Mapping[str, Any], path: str, choices: Sequence[str]) -> str:
        value = self.value(entry, path)
        if value not in choices:
            self.refuse(path, f"is {json.dumps(value)}; it must be one of {', '.join(choices)}")
        return str(value)

    def flag(self, entry: Mapping[str, Any], path: str) -> bool:
        value = self.value(entry, path)
        if not isinstance(value, bool):
            self.refuse(path, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def number(self, value: object, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(path, f"must be a number, not {_kind(value)}")
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse(path, "must be a finite number")
        return number

    def numbers(self, value: object, path: str) -> tuple[float, ...]:
        # MATLAB's jsonencode writes a list of one as a bare number.
        items = value if isinstance(value, list) else [value]
        if not items:
            self.refuse(path, "is empty")
        return tuple(self.number(item, f"{path}[{i}]") for i, item in enumerate(items))

    def interval(self, entry: Mapping[str, Any], path: str) -> tuple[float, float]:
        value = self.value(entry, path)
        if not isinstance(value, list) or len(value) != 2:
            self.refuse(path, "must be a list of two numbers [low, high]")
        low, high = self.numbers(value, path)
        if low >= high:
            self.refuse(path, f"is [{low:g}, {high:g}]; the first must be below the second")
        return low, high

    def shape(self, entry: Mapping[str, Any], path: str) -> tuple[int, int, int, int]:
        value = self.value(entry, path)
        if not isinstance(value, list) or len(value) != 4:
            self.refuse(path, "must be a list of four sizes, such as [1, 3, 32, 32]")
        for i, size in enumerate(value):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                self.refuse(
                    f"{path}[{i}]", f"is {json.dumps(size)}; a size is a whole number above 0"
                )
        n, a, b, c = value
        return n, a, b, c

    def scaling(self, entry: object, path: str) -> Scaling:
        if not isinstance(entry, dict):
            raise ContractError(f"{self.name}: {path} must be an object, not {_kind(entry)}")
        kind = self.choice(entry, f"{path}.type", ("linear", "clip_linear"))
        source = "src_range" if kind == "linear" else "clip"
        return Scaling(
            type=kind,
            src_range=self.interval(entry, f"{path}.{source}"),
            dst_range=self.interval(entry, f"{path}.dst_range"),
        )

    def zscore(
        self, entry: Mapping[str, Any], path: str, dst_range: tuple[float, float] | None
    ) -> ZScore:
        mu = self.numbers(self.value(entry, f"{path}.mu"), f"{path}.mu")
        sigma = self.numbers(self.value(entry, f"{path}.sigma"), f"{path}.sigma")
        if len(mu) != len(sigma):
            self.refuse(f"{path}.sigma", f"has {len(sigma)} entries and {path}.mu has {len(mu)}")
        for i, (m, s) in enumerate(zip(mu, sigma, strict=True)):
            if s <= 0:
                self.refuse(f"{path}.sigma[{i}]", f"is {s:g}; a standard deviation is above 0")
            if dst_range and not dst_range[0] <= m <= dst_range[1]:
                self.refuse(
                    f"{path}.mu[{i}]",
                    f"is {m:g}, outside dst_range [{dst_range[0]:g}, {dst_range[1]:g}]: "
                    "mu and sigma are in units after scaling",
                )
        return ZScore(mu, sigma)

    def labels(self, root: Mapping[str, Any], path: str) -> tuple[str, ...]:
        value = self.value(root, path)
        if not isinstance(value, list) or not value:
            self.refuse(path, "must be a list of class names")
        for i, label in enumerate(value):
            if not isinstance(label, str) or not label.strip():
                self.refuse(f"{path}[{i}]", f"must be a class name, not {json.dumps(label)}")
            if label in value[:i]:
                self.refuse(f"{path}[{i}]", f"repeats {label!r}; class names are unique")
        return tuple(value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
