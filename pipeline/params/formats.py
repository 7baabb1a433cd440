"""The table of data formats: who opens a file of each, and what that needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A form in which patches lie on disk."""

    #: module:function, called with the section `ingest.data`, the path, the file of labels or None,
    #: and the names of the classes; returns a `pipeline.data.source.PatchSource`.
    opener: str
    packages: tuple[str, ...] = ()  # of the extra `data`, by the names they are imported by
    labels_apart: bool = False  # whether labels lie in a file of their own


FORMATS = {
    "npz": Format("pipeline.data.formats.npz:from_npz"),
    "npy": Format("pipeline.data.formats.npy:from_npy", labels_apart=True),
    "so2sat-h5": Format("pipeline.data.formats.so2sat_h5:from_so2sat", ("h5py",)),
    "image-folder": Format(
        "pipeline.data.formats.image_folder:from_image_folder", ("png", "tifffile")
    ),
}
