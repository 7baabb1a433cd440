"""What int8 costs students in points of top-1, on real patches: calibration.py --students.

Landsat patches of the example (its data set is the only real one with so many), split anew so that
more than 3,000 test images are left: rows 0 to 2999 train, a fifth of them validates, the others
test. The student is distilled, calibrated and judged by the commands that users have. The example's
teachers have seen some of the test patches; that moves float and int8 alike.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from metis.backend import QuantizedModel
from pipeline.calibration.int8_loss import compare_int8
from pipeline.data.dataset import StudentData
from pipeline.run.manifest import load_manifest

KDPIPE = Path(sys.executable).parent / "kdpipe"
EXAMPLE = Path(__file__).parents[1] / "examples" / "landsat"
STUDENTS = ("resnet10t", "mobilenetv4_conv_small_050")

DATA, ROWS, TRAIN = "landsat_satellite.npz", 6435, 3000
CHANGES = (
    f"ingest.data.train={{path: {DATA}, rows: [0, {TRAIN}]}}",
    f"ingest.data.test={{path: {DATA}, rows: [{TRAIN}, {ROWS}]}}",
    # What the teachers reach was recorded on other validation patches.
    "ingest.teachers=[{path: teachers/densenet_green_red_nir1.onnx, bands: [0, 1, 2]}, "
    "{path: teachers/densenet_all_bands.onnx, bands: [0, 1, 2, 3]}]",
    # The judge is the test split below; 600 validation patches decide nothing within a point.
    "calibrate.max_int8_loss=100",
)

#: Points of top-1 that int8 may lose.
LIMIT = 1.0


def measure_students() -> list[tuple[str, str, bool]]:
    """Train, calibrate and print the table.

    Returns:
        Per student what is promised, what was found, and whether the promise was kept.
    """
    print("\n| student | test images | float | int8 | int8 loses, points (95 % interval) |")
    print("|---|---|---|---|---|", flush=True)
    bars = []
    with tempfile.TemporaryDirectory(prefix="kdpipe-") as folder:
        project = Path(folder) / "landsat"
        shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("runs"))
        for student in STUDENTS:
            found = _measured(project, student)
            loss, (low, high) = found["int8_loss_points"], found["int8_loss_interval95_points"]
            shown = f"{loss:+.2f} ({low:+.2f} to {high:+.2f})"
            print(
                f"| {student} | {found['n_val']} | {100 * found['top1_val_float']:.2f} % | "
                f"{100 * found['top1_val_int8']:.2f} % | {shown} |",
                flush=True,
            )
            words = f"{student}: int8 loses at most {LIMIT} point on at least 3,000 images"
            bars.append((words, shown, loss <= LIMIT and found["n_val"] >= 3000))
    return bars


def _measured(project: Path, student: str) -> dict[str, float]:
    """`compare_int8` on the test split; its keys speak of validation."""
    words = [w for change in (*CHANGES, f"distill.student={student}") for w in ("--set", change)]
    command = [KDPIPE, "run", "--to", "calibrate", "--run", student, *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{student}: {done.stderr}")
    manifest = load_manifest(project / "runs" / student)
    assert manifest is not None
    paths = manifest.paths(project / "runs" / student)
    data = StudentData(paths)
    return compare_int8(
        paths.student,
        QuantizedModel.load(paths.quantized_model),
        data,
        data.test,
    )
