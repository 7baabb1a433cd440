"""How far the estimate of frame rates is from the published ones, against FPS = a / MACs.

    python benchmarks/estimator.py            # export 26 networks, fit, leave each one out
    python benchmarks/estimator.py --cached   # the same from benchmarks/estimator_features.csv
    python benchmarks/estimator.py --write    # also write that file and estimator.json

Every network is built with random weights, exported as a student is, and read by
metis/estimate/workload.py. The five constants are fitted to both boards at once: least squares
of the logarithms, with Cauchy's loss, as one published row (SqueezeNet 1.0) follows no known rule.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import least_squares

from metis.estimate.cost_model import (
    BOARDS,
    Board,
    CostModel,
    Published,
    Settings,
    frame_ms,
    load_cost_model,
    published_rows,
)
from metis.estimate.estimator import BOARD_NAMES
from metis.estimate.workload import Layer, read_workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import onnx

HERE = Path(__file__).parent
FEATURES, STUDY = HERE / "estimator_features.csv", HERE / "estimator_study.csv"
CONSTANTS = HERE.parent / "metis" / "estimate" / "estimator.json"

FITTED = ("tiles", "weights", "taps", "operators", "bandwidth")
START = (5.0, 0.01, 0.0015, 2.0, 15.0)
#: Relative error at which Cauchy's loss begins to disregard a row.
OUTLIER = 0.1

#: What is asked for: median and 90th percentile of the errors, %, and rows within 20 %.
BARS = (6.0, 20.0, 23)

Errors = dict[Board, list[float]]  # predicted / published - 1, in %, by row


@dataclass(frozen=True)
class Row:
    """A published row and what its network asks of the chip."""

    published: Published
    total: Layer

    def settings(self) -> Settings:
        return Settings(self.published.aipu_cores, self.published.replication)


def main() -> None:
    """Print every row, the summary, and what naive prediction would give."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cached", action="store_true", help="read the committed features")
    parser.add_argument("--write", action="store_true", help="write features and constants")
    given = parser.parse_args()
    totals = read_totals(FEATURES) if given.cached else exported_totals(published_rows())
    rows = [Row(published, totals[published.network]) for published in published_rows()]
    costs = fit(rows)
    alone, families = left_out(rows, by_family=False), left_out(rows, by_family=True)
    if given.write:
        write_totals(FEATURES, totals)
        write_constants(costs, {board: error_factor(families[board]) for board in BOARDS})
    for line in (*differences(totals, read_totals(STUDY)), "", *table(rows, alone), ""):
        print(line)
    naive = left_out(rows, by_family=False, fit_and_predict=fit_naive)
    contenders = {"estimate": alone, "estimate, family left out": families, "a / MACs": naive}
    print(*summary(contenders), sep="\n")
    print("\nconstants: " + ", ".join(f"{name} {getattr(costs, name):.4g}" for name in FITTED))


def exported_totals(rows: Iterable[Published]) -> dict[str, Layer]:
    """What each network asks of the chip, from its export."""
    found = {}
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            graph = export(row, Path(folder) / "network.onnx")
        found[row.network] = read_workload(graph).total
    return found


def export(row: Published, path: Path) -> onnx.ModelProto:
    """The network with random weights, exported as a student is."""
    import torchvision

    from pipeline.networks.build import create_network
    from pipeline.networks.export import export_network

    shape = (3, row.size, row.size)
    if row.package == "timm":
        network = create_network(row.network, shape, 1000, seed=0)
    else:
        network = torchvision.models.get_model(row.network, weights=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        return export_network(network, shape, path).model


def fit(rows: Sequence[Row]) -> CostModel:
    """The five constants that fit the published rows of both boards."""
    base = load_cost_model()

    def costs(logarithms: Iterable[float]) -> CostModel:
        return replace(base, **dict(zip(FITTED, np.exp(logarithms).tolist(), strict=True)))

    def residuals(logarithms: Iterable[float]) -> list[float]:
        trial = costs(logarithms)
        return [
            np.log(predict(trial, row, board) / row.published.fps[board])
            for row in rows
            for board in BOARDS
        ]

    found = least_squares(residuals, np.log(START), loss="cauchy", f_scale=OUTLIER)
    return costs(found.x)


def predict(costs: CostModel, row: Row, board: Board) -> float:
    """Frames per second."""
    return 1000 / frame_ms(row.total, row.settings(), costs, board)


def fit_mechanistic(rows: Sequence[Row]) -> Callable[[Row, Board], float]:
    """A predictor with the five constants."""
    costs = fit(rows)
    return lambda row, board: predict(costs, row, board)


def fit_naive(rows: Sequence[Row]) -> Callable[[Row, Board], float]:
    """FPS = a / MACs, a by board: the median of what the rows say."""
    speed = {
        board: float(np.median([row.published.fps[board] * row.total.macs for row in rows]))
        for board in BOARDS
    }
    return lambda row, board: speed[board] / row.total.macs


def left_out(
    rows: Sequence[Row],
    *,
    by_family: bool,
    fit_and_predict: Callable[[Sequence[Row]], Callable[[Row, Board], float]] = fit_mechanistic,
) -> Errors:
    """Errors of each row, predicted from the others, or from those of other families."""
    errors: Errors = {board: [] for board in BOARDS}
    for row in rows:
        others = [
            other
            for other in rows
            if other is not row
            and not (by_family and other.published.family == row.published.family)
        ]
        predicted = fit_and_predict(others)
        for board in BOARDS:
            errors[board].append(100 * (predicted(row, board) / row.published.fps[board] - 1))
    return errors


def error_factor(errors: Sequence[float]) -> float:
    """Nine tenths of the errors are within this factor, up or down."""
    ratios = np.abs(np.log1p(np.array(errors) / 100))
    return float(np.exp(np.percentile(ratios, 90)))


def table(rows: Sequence[Row], errors: Errors) -> list[str]:
    """Every row: published frame rate and error when it is left out of the fit."""
    lines = [
        "| network | aipu_cores | published, PCIe / M.2 | error, PCIe / M.2 |",
        "|---|---|---|---|",
    ]
    for i, row in enumerate(rows):
        fps = " / ".join(f"{row.published.fps[board]:.0f}" for board in BOARDS)
        found = " / ".join(f"{errors[board][i]:+.0f} %" for board in BOARDS)
        lines.append(f"| {row.published.network} | {row.published.aipu_cores} | {fps} | {found} |")
    return lines


def summary(contenders: dict[str, Errors]) -> list[str]:
    """Median, 90th percentile, rows within 20 %, by contender and board."""
    median, p90, within = BARS
    lines = [
        f"| prediction | board | median (bar {median:g} %) | 90th percentile (bar {p90:g} %) "
        f"| within 20 % (bar {within}) |",
        "|---|---|---|---|---|",
    ]
    for name, errors in contenders.items():
        for board in BOARDS:
            size = np.abs(errors[board])
            lines.append(
                f"| {name} | {BOARD_NAMES[board]} | {np.median(size):.1f} % "
                f"| {np.percentile(size, 90):.0f} % | {(size <= 20).sum()} of {len(size)} |"
            )
    return lines


def differences(totals: dict[str, Layer], study: dict[str, Layer]) -> list[str]:
    """Where our count of a network is not the study's."""
    lines = []
    for network, ours in totals.items():
        for name in QUANTITIES:
            mine, theirs = getattr(ours, name), getattr(study[network], name)
            if mine != theirs:
                relative = f"{100 * (mine / theirs - 1):+.2f} %" if theirs else "-"
                lines.append(f"{network}: {name} {mine}, in the study {theirs} ({relative})")
    count = len(totals) * len(QUANTITIES)
    return [f"{count - len(lines)} of {count} quantities equal the study's; the others:", *lines]


QUANTITIES = tuple(
    field.name for field in fields(Layer) if field.name not in ("name", "op_type", "needed_weights")
)


def read_totals(path: Path) -> dict[str, Layer]:
    """Quantities by network from a file with comments."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return {
        row["network"]: Layer("all", "all", **{name: int(row[name]) for name in QUANTITIES})
        for row in csv.DictReader(lines)
    }


def write_totals(path: Path, totals: dict[str, Layer]) -> None:
    """Write what metis/estimate/workload.py counted."""
    with path.open("w", newline="") as file:
        file.write(
            "# What metis/estimate/workload.py counts in the exports of the published networks;\n"
            "# written by python benchmarks/estimator.py --write\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", *QUANTITIES])
        for network, total in totals.items():
            writer.writerow([network, *(getattr(total, name) for name in QUANTITIES)])


def write_constants(costs: CostModel, factors: dict[Board, float]) -> None:
    """Put the fit into the file that the product reads."""
    document = json.loads(CONSTANTS.read_text())
    document["fitted"] = {name: float(f"{getattr(costs, name):.4g}") for name in FITTED}
    document["error_factor"] = {board: round(factor, 3) for board, factor in factors.items()}
    CONSTANTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
