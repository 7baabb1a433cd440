"""Choose calibration samples, quantize the student to int8, and measure what that costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from metis.backend import backend_tools, open_backend, require_backend
from pipeline.stage import Facts, Gate, InputError, Job, Stage, same_as_field, unkeyed_field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.splits import DatasetSplit


@dataclass(frozen=True)
class CalibrateParams:
    """How to quantize."""

    samples: Annotated[int, Meta(ge=2, le=2000)] = 200  # the range that the SDK accepts
    scheme: Literal["per_tensor_histogram", "per_tensor_min_max"] = "per_tensor_histogram"
    backend: Literal["emulator", "voyager"] | None = same_as_field("compile.backend")
    max_int8_loss: Annotated[float, Meta(gt=0)] = unkeyed_field(1.0)  # points of top-1


def run(job: Job, params: CalibrateParams) -> Facts:
    """Write the calibration set and the int8 model; compare it with the float student."""
    import numpy as np

    from pipeline.parity import compare_int8
    from pipeline.splits import DatasetSplit, class_histogram
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    classes = len(load_contract(job.inputs["contract"]).labels)
    train = DatasetSplit.load(job.inputs["dataset"] / "train")
    chosen = choose_samples(train, params.samples, classes, job.seed)
    samples = student_tensor(train.images[chosen], given)[:, None]
    folder = job.outputs["calibration_set"]
    folder.mkdir()
    np.save(folder / "samples.npy", samples)
    calibration = {
        "split": "train",
        "samples": len(chosen),
        "classes": class_histogram(train.labels[chosen], classes),
        "rows": train.rows[chosen].tolist(),
        "sha256": sha256(samples.tobytes()).hexdigest(),
    }
    (folder / "samples.json").write_text(json.dumps(calibration) + "\n")

    backend = open_backend(str(params.backend))
    with job.progress("calibrate", len(chosen)) as bar:
        model = backend.quantize(
            job.inputs["student"],
            folder / "samples.npy",
            job.outputs["quantized_model"],
            scheme=params.scheme,
            progress=bar.update,
        )
    val = DatasetSplit.load(job.inputs["dataset"] / "val")
    del calibration["rows"]  # they are in samples.json
    return {
        "backend": model.backend,
        "backend_version": model.version,
        "scheme": model.scheme,
        "calibration": calibration,
        **compare_int8(job.inputs["student"], model, given, val),
    }


def choose_samples(train: DatasetSplit, count: int, classes: int, seed: int) -> NDArray[np.int64]:
    """Draw training samples, every class in its share and no image twice, in a random fixed order.

    Args:
        train: the training split.
        count: how many.
        classes: number of classes.
        seed: of the choice and the order.

    Returns:
        Indices into the split, int64, (count,).

    Raises:
        InputError: there are not as many different images.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    seen: set[bytes] = set()
    queues: list[list[int]] = []
    for label in range(classes):
        members = random.permutation(np.flatnonzero(train.labels == label))
        queue = []
        for index in members.tolist():
            # The SDK's deploy script stops when two of the first images are the same.
            content = train.images[index].tobytes()
            if content not in seen:
                seen.add(content)
                queue.append(index)
        queues.append(queue)
    total = sum(map(len, queues))
    if total < count:
        raise InputError(
            f"calibrate.samples is {count}, but the training split has only {total} different "
            "images; ask for fewer"
        )
    shares = _shares([len(queue) for queue in queues], count)
    chosen = [index for queue, share in zip(queues, shares, strict=True) for index in queue[:share]]
    return random.permutation(np.array(chosen, np.int64))


def _shares(sizes: list[int], count: int) -> list[int]:
    """Divide `count` in proportion to `sizes`, by largest remainders; at least one where it can."""
    total = sum(sizes)
    exact = [count * size / total for size in sizes]
    shares = [min(size, max(int(share), 1)) for size, share in zip(sizes, exact, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    while sum(shares) != count:
        step = 1 if sum(shares) < count else -1
        for i in order if step > 0 else reversed(order):
            if sum(shares) != count and 0 <= shares[i] + step <= sizes[i]:
                shares[i] += step
    return shares


def gates(params: CalibrateParams, facts: Facts) -> list[Gate]:
    """int8 loses no more than allowed, and there are enough samples to say so."""
    loss: float = facts["int8_loss_points"]
    low, high = facts["int8_loss_interval95_points"]
    limit = params.max_int8_loss
    verdict = "passed" if high <= limit else "failed" if low > limit else "undecided"
    advice = {
        "passed": "",
        "failed": "; try the other calibrate.scheme, more calibrate.samples, or another student",
        "undecided": f"; {facts['n_val']} validation patches are too few to decide: use more, or "
        "raise calibrate.max_int8_loss",
    }
    return [
        Gate(
            "int8_loss",
            verdict == "passed",
            f"{verdict}: int8 loses {loss:+.2f} points of top-1, 95 % interval {low:+.2f} to "
            f"{high:+.2f}, limit {limit:g}{advice[verdict]}",
        )
    ]


def ready(params: CalibrateParams) -> None:
    """The backend must be here before anything starts."""
    require_backend(str(params.backend))


STAGE = Stage(
    inputs=("contract", "student_input", "dataset", "student"),
    outputs={"calibration_set": "calibration_set", "quantized_model": "quantized_model"},
    params=CalibrateParams,
    run=run,
    gates=gates,
    ready=ready,
    tools=lambda params: backend_tools(str(params.backend)),
)
