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


FORMATS = {
    "npz": Format("pipeline.data.arrays:from_npz"),
    "npy": Format("pipeline.data.arrays:from_npy"),
    "so2sat-h5": Format("pipeline.data.hdf5:from_so2sat", ("h5py",)),
    "image-folder": Format("pipeline.data.image_folder:from_image_folder", ("png", "tifffile")),
}
