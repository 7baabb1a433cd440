"""The backend on Axelera's Voyager SDK. So far it finds the SDK; it does not drive it yet."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NoReturn

from metis.backend import BackendMissingError, Probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from metis.backend import QuantizedModel

#: Distributions of the SDK, 1.6 and later; both must be of one release.
DISTRIBUTIONS = ("axelera-devkit", "axelera-rt")

NOT_DRIVEN = (
    "this release of kdpipe does not drive the Voyager SDK yet; "
    "compile.backend: emulator runs the whole pipeline on this machine"
)


class Voyager:
    """Finds the SDK in the current interpreter."""

    name = "voyager"

    def probe(self) -> Probe:
        """Which of the SDK's packages are installed. See `Backend`."""
        versions = {}
        for name in DISTRIBUTIONS:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        if "axelera-devkit" not in versions:
            return Probe(
                False,
                versions,
                "the Voyager SDK is not installed: pip install axelera-devkit axelera-rt (same "
                "release, 1.6 to 1.8) from Axelera's package index, Python 3.10 to 3.13",
            )
        return Probe(False, versions, NOT_DRIVEN)

    def quantize(
        self,
        student: Path,
        samples: Path,
        into: Path,
        *,
        scheme: str,
        progress: Callable[[int], object] = lambda n: None,
    ) -> NoReturn:
        """See `Backend`."""
        raise BackendMissingError(self.probe().missing)

    def infer(self, model: QuantizedModel, inputs: NDArray[np.float32]) -> NoReturn:
        """See `Backend`."""
        raise BackendMissingError(self.probe().missing)

    def compile(self, model: QuantizedModel, into: Path, *, aipu_cores: int) -> NoReturn:
        """See `Backend`."""
        raise BackendMissingError(self.probe().missing)
