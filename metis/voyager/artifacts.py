"""What a Voyager compile leaves behind: find it, check it, read the device tensors from it.

Source: public documentation and Python code of Voyager 1.2.5 to 1.8. Pages disagree on where files
land, so everything below the compiler's working folder is looked at.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from metis.backend import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from preprocessing.int8 import TensorSpec


#: First part of `manifest_version`; "1.0" and "1.1" were seen.
_MANIFEST_MAJOR = "1"

#: Spellings of the key that names the ONNX file after the device; the tutorial reads both.
_AFTER = ("postprocess_graph", "postamble_graph")


@dataclass(frozen=True)
class Artifacts:
    """What was collected into a folder, by names relative to it."""

    entry: str  # what the runtime loads: model.json, or an .axm that holds it
    axm: str  # empty: this release made none
    preamble: str
    postamble: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    manifest_version: str


def collect(work: Path, destination: Path) -> Artifacts:
    """Move the archive, the final configuration and the model folder, wherever they lie.

    Args:
        work: the compiler's working folder.
        destination: folder to fill: `<name>.axm`, `compiler_config_final.toml`, `model/`.

    Raises:
        BackendError: there is nothing that a runtime could load.
    """
    archives = sorted(work.rglob("*.axm"))
    for file in archives[:1] + sorted(work.rglob("compiler_config_final.toml"))[:1]:
        shutil.copyfile(file, destination / file.name)
    manifests = [path for path in sorted(work.rglob("manifest.json")) if _names_a_model(path)]
    if manifests:
        shutil.copytree(manifests[0].parent, destination / "model", ignore=_not_of_the_model)
    elif archives:
        _unpack(destination / archives[0].name, destination / "model")
    else:
        raise BackendError(
            "the SDK's compiler ended without an error and without a model: no .axm, and no "
            "manifest.json that names one"
        )
    return _read_artifacts(destination, archives[0].name if archives else "")


def _names_a_model(manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text()).get("model_lib_file"))
    except (OSError, ValueError):
        return False


def _not_of_the_model(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if n.endswith(".axm") or n == "compiler_config_final.toml"]


def _unpack(archive: Path, destination: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            if outside := [n for n in names if not _is_inside(n)]:
                raise BackendError(f"{archive.name} names files outside itself: {outside[0]}")
            if (bad := file.testzip()) is not None:
                raise BackendError(f"{archive.name} is damaged: {bad}")
            file.extractall(destination)
    except zipfile.BadZipFile as error:
        raise BackendError(f"{archive.name} is not a ZIP archive: {error}") from error


def _is_inside(name: str) -> bool:
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return not absolute and ".." not in PurePosixPath(name).parts


def _read_artifacts(folder: Path, axm: str) -> Artifacts:
    manifest = _Manifest.find(folder / "model")
    home = manifest.path.parent.relative_to(folder)
    preamble = manifest.file("preprocess_graph")
    postamble = next((name for key in _AFTER if (name := manifest.file(key))), "")
    model = manifest.file("model_lib_file")
    if not model and not axm:
        raise BackendError("the compiled model's manifest.json names no model_lib_file")
    return Artifacts(
        entry=(home / model).as_posix() if model else axm,
        axm=axm,
        preamble=(home / preamble).as_posix() if preamble else "",
        postamble=(home / postamble).as_posix() if postamble else "",
        inputs=tuple(manifest.tensors("input")),
        outputs=tuple(manifest.tensors("output")),
        manifest_version=manifest.version,
    )


class _Manifest:
    """manifest.json of a compiled model; paths in it are relative to its folder."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self._raw = raw
        self.version = str(raw.get("manifest_version", ""))

    @staticmethod
    def find(folder: Path) -> _Manifest:
        paths = sorted(folder.rglob("manifest.json"))
        if not paths:
            raise BackendError("the compiled model has no manifest.json; its tensors are unknown")
        try:
            raw = json.loads(paths[0].read_text())
        except ValueError as error:
            raise BackendError(f"the compiled model's manifest.json is damaged: {error}") from error
        manifest = _Manifest(paths[0], raw)
        if manifest.version and manifest.version.split(".")[0] != _MANIFEST_MAJOR:
            raise BackendError(
                f"the compiled model's manifest has version {manifest.version}; this kdpipe reads "
                f"{_MANIFEST_MAJOR}.x"
            )
        return manifest

    def file(self, key: str) -> str:
        """The file that a key names, or nothing; it is there and not empty."""
        name = self._raw.get(key) or ""
        if not name:
            return ""
        path = self.path.parent / name
        if not _is_inside(name) or not path.is_file() or not path.stat().st_size:
            raise BackendError(f"the compiled model's {key}, {name}, is missing, empty or outside")
        return str(name)

    def tensors(self, end: str) -> Iterator[TensorSpec]:
        """The device tensors at one end, "input" or "output"."""
        from preprocessing.int8 import TensorSpec  # numpy; this file stays light

        try:
            layout = self._raw.get("input_tensor_layout", "NHWC")
            if layout != "NHWC":
                raise ValueError(f"layout {layout}")
            prefix = "de" if end == "output" else ""
            for i, (shape, pads, (scale, zero_point)) in enumerate(
                zip(
                    self._raw[f"{end}_shapes"],
                    self._raw[f"n_padded_ch_{end}s"],
                    self._raw[f"{prefix}quantize_params"],
                    strict=True,
                )
            ):
                spec = TensorSpec(
                    name=f"{end}_{i}",
                    shape=tuple(map(int, shape)),  # type: ignore[arg-type]  # checked below
                    padding=_pairs(pads),
                    scale=float(scale),
                    zero_point=int(zero_point),
                )
                if len(spec.shape) != 4 or min(spec.unpadded) < 1 or spec.scale <= 0:
                    raise ValueError(f"shape {shape}, padding {pads}, scale {scale}")
                yield spec
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(
                f"the compiled model's manifest does not describe its {end}s: "
                f"{type(error).__name__} {error}"
            ) from error


def _pairs(pads: list[int]) -> tuple[tuple[int, int], ...]:
    """(low, high) for N, H, W, C from eight numbers, or from the older top, left, bottom, right."""
    if len(pads) == 4:
        top, left, bottom, right = map(int, pads)
        return ((0, 0), (top, bottom), (left, right), (0, 0))
    if len(pads) != 8 or min(pads) < 0:
        raise ValueError(f"padding {pads}")
    low, high = map(int, pads[::2]), map(int, pads[1::2])
    return tuple(zip(low, high, strict=True))
