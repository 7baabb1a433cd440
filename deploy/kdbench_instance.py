"""One loaded model with everything around it: float tensor in, logits out, buffers made once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kdbench_runtime import session
from preprocessing.int8 import InputBuffer, OutputBuffer
from preprocessing.scores import without_positions

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kdbench_bundle import Bundle
    from kdbench_runtime import Runtime

_now = time.perf_counter_ns


class HostGraph:
    """A preamble or postamble: float32 in, float32 out, in onnxruntime on this machine's CPU."""

    def __init__(self, model: Path) -> None:
        self._session = session(model)
        given = self._session.get_inputs()[0]
        self._name = given.name
        self._rank = len(given.shape)
        first = given.shape[0] if given.shape else None
        self._batch = first if isinstance(first, int) else None  # None: any

    def __call__(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, H, W) -> (N, ...); rank 2 gets (N, C * H * W), a graph of batch 1 gets N calls."""
        n = len(tensor)
        if self._rank != tensor.ndim:
            tensor = tensor.reshape(n, *([-1] + [1] * (self._rank - 2)))
        if self._batch in (None, n):
            return self._call(tensor)
        return np.concatenate([self._call(tensor[i : i + 1]) for i in range(n)])

    def _call(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._session.run(None, {self._name: tensor})[0]
        return result


class Instance:
    """A context manager; enter and use it in one thread.

    Args:
        bundle: the bundle.
        runtime: opened.
        double_buffer: ask the device for it; results then arrive `late` queries later.

    Attributes:
        late: how many queries later a result arrives.
        run_ns: nanoseconds of the runtime's call in the last query.
        all_ns: nanoseconds of the last query, from tensor to logits.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, *, double_buffer: bool = False) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._double_buffer = double_buffer
        self._input, self._output = InputBuffer(bundle.inputs), OutputBuffer(bundle.outputs)
        self._preamble, self._postamble = (
            HostGraph(bundle.folder / bundle.index[end]) if bundle.index[end] else None
            for end in ("preamble", "postamble")
        )
        self.late = self.run_ns = self.all_ns = 0

    def __enter__(self) -> Instance:
        self._loaded: Any = self._runtime.open_instance(double_buffer=self._double_buffer)
        self.late = self._loaded.late
        return self

    def __exit__(self, *error: object) -> None:
        self._loaded.close()

    def query(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """One call, float32 (batch, C, H, W) -> logits (batch, classes, ...) of `late` queries ago.

        The next query may overwrite what is returned.
        """
        start = _now()
        if self._preamble:
            tensor = self._preamble(tensor)
        codes = self._input.fill(tensor)
        before = _now()
        self._loaded.run(codes, self._output.codes)
        after = _now()
        logits = self._output.read()
        if self._postamble:
            logits = self._postamble(logits)
        logits = without_positions(logits)
        self.run_ns, self.all_ns = after - before, _now() - start
        return logits

    def all_logits(self, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of any number of frames; what fills up the last batch is thrown away."""
        return np.concatenate(
            [
                self.query(group)[: len(tensors) - i * self._bundle.batch].copy()
                for i, group in enumerate(batches(tensors, self._bundle.batch))
            ]
        )


def batches(tensors: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """(N, C, H, W) -> (ceil(N / batch), batch, C, H, W); first frames fill up the last group."""
    groups = -(-len(tensors) // batch)
    filled = np.resize(tensors, (groups * batch, *tensors.shape[1:]))
    return filled.reshape(groups, batch, *tensors.shape[1:])
