"""The legs of parity, from training tensor to int8 model: what each says, and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.facts import ExportLeg, Int8Leg, Int8Values, PngLeg, YamlLeg

if TYPE_CHECKING:
    from pipeline.facts import (
        CalibrateFacts,
        ComparisonFacts,
        DistillFacts,
        ExportFacts,
        ImageValues,
        Leg,
    )
    from pipeline.params.benchmark import Limits


@dataclass(frozen=True)
class JudgedLeg:
    """A leg beside its limit."""

    leg: Leg
    message: str  # what was found, in one line
    limit: str  # in words; empty where the leg does not apply
    passed: bool | None  # None: does not apply

    def document(self) -> dict[str, Any]:
        """For programs."""
        tree: dict[str, Any] = msgspec.to_builtins(self.leg)
        return {**tree, "limit": self.limit, "passed": self.passed, "words": self.message}


def judge(leg: Leg, limits: Limits) -> JudgedLeg:
    """Whether a leg keeps its limit."""
    if leg.obstacle:
        return JudgedLeg(leg, f"does not apply: {leg.obstacle}", "", None)
    match leg:
        case PngLeg(values=values):
            # One level where the device resizes bilinear; else the leg says 0, and it is exact.
            limit = limits.max_png_levels * float(values.grey_level or 0.0)
            return JudgedLeg(leg, *_judge_images(values, limit, f"{limit:.3g}"))
        case YamlLeg(values=values):
            limit = limits.max_yaml_difference
            return JudgedLeg(leg, *_judge_images(values, limit, f"{limit:g}"))
        case ExportLeg(values=values):
            return JudgedLeg(leg, *_judge_export(values, limits.max_export_difference))
        case Int8Leg(values=values):
            return JudgedLeg(leg, *_judge_int8(values, limits.max_int8_loss))


def _judge_images(values: ImageValues, limit: float, limit_text: str) -> tuple[str, str, bool]:
    difference, wrong = values.max_abs_difference, values.fields or ()
    if isinstance(difference, float):
        first, close = f"max abs difference {difference:.3g}", difference <= limit
    else:
        first, close = "no tensor", False
    return "; ".join([first, *wrong]), limit_text, close and not wrong


def _judge_export(values: ExportFacts, limit: float) -> tuple[str, str, bool]:
    difference, agreement = values.max_abs_logit_difference, values.agreement
    message = f"max abs logit difference {difference:.3g}, top-1 agreement {agreement:.2%}"
    return message, f"{limit:g}, 100 %", difference <= limit and agreement == 1.0


def _judge_int8(values: Int8Values, limit: float) -> tuple[str, str, bool]:
    low, high = values.loss_interval95_points
    sqnr = "without noise" if values.sqnr_db is None else f"{values.sqnr_db:.1f} dB"
    message = (
        f"loss {values.loss_points:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}), "
        f"top-1 {values.score_float:.4f} and {values.score_int8:.4f}, agreement "
        f"{values.agreement:.2%}, cosine mean {values.cosine_mean:.4f} min "
        f"{values.cosine_min:.4f}, SQNR {sqnr}"
    )
    return message, f"{limit:g} points", high <= limit


def export_leg(distill: DistillFacts, export: ExportFacts | None = None) -> ExportLeg:
    """The leg that distill measured, or with figures that were measured anew."""
    source, target = "torch student", "ONNX student in onnxruntime"
    return ExportLeg(source, target, distill.n_val, export or distill.export)


def int8_leg(calibrate: CalibrateFacts, comparison: ComparisonFacts | None = None) -> Int8Leg:
    """The leg that calibrate measured, or with figures that were measured anew."""
    measured = comparison or calibrate
    values = Int8Values(
        score_float=measured.score_float,
        score_int8=measured.score_int8,
        loss_points=measured.int8_loss_points,
        loss_interval95_points=measured.int8_loss_interval95_points,
        agreement=measured.agreement,
        cosine_mean=measured.logits_cosine_mean,
        cosine_min=measured.logits_cosine_min,
        sqnr_db=measured.logits_sqnr_db,
    )
    target = f"int8 on the host ({calibrate.backend}, {measured.measured_on})"
    return Int8Leg("float ONNX", target, measured.n_val, values)
