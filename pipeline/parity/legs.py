"""The legs of parity, from training tensor to int8 model: what each says, and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.params.benchmark import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.run.stage import Facts


@dataclass(frozen=True)
class Leg:
    """One comparison on the validation split."""

    name: str  # png, yaml, export or int8
    source: str  # what is compared
    target: str  # with what
    n: int  # validation patches
    values: dict[str, Any] = field(default_factory=dict)
    obstacle: str = ""  # why the leg does not apply

    def judge(self, limits: Limits) -> tuple[str, bool | None]:
        """The limit in words, and whether the leg keeps it; None when it does not apply."""
        if self.obstacle:
            return "", None
        if self.name == "png":
            limit = limits.max_png_levels * float(self.values["grey_level"])
            fine = not self.values.get("fields")
            return f"{limit:.3g}", fine and _within(self.values["max_abs_difference"], limit)
        if self.name == "yaml":
            limit = limits.max_yaml_difference
            fine = not self.values["fields"]
            return f"{limit:g}", fine and _within(self.values["max_abs_difference"], limit)
        if self.name == "export":
            limit = limits.max_export_difference
            close = _within(self.values["max_abs_logit_difference"], limit)
            return f"{limit:g}, 100 %", close and self.values["top1_agreement"] == 1.0
        limit = limits.max_int8_loss
        return f"{limit:g} points", _within(self.values["loss_interval95_points"][1], limit)

    def words(self) -> str:
        """What was found, in one line."""
        if self.obstacle:
            return f"does not apply: {self.obstacle}"
        found = self.values
        if self.name in ("png", "yaml"):
            difference = found["max_abs_difference"]
            first = "no tensor" if difference is None else f"max abs difference {difference:.3g}"
            return "; ".join([first, *found.get("fields", [])])
        if self.name == "export":
            return (
                f"max abs logit difference {found['max_abs_logit_difference']:.3g}, "
                f"top-1 agreement {found['top1_agreement']:.2%}"
            )
        low, high = found["loss_interval95_points"]
        sqnr = found["sqnr_db"]
        return (
            f"loss {found['loss_points']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}), "
            f"top-1 {found['top1_float']:.4f} and {found['top1_int8']:.4f}, agreement "
            f"{found['top1_agreement']:.2%}, cosine mean {found['cosine_mean']:.4f} min "
            f"{found['cosine_min']:.4f}, SQNR "
            + ("without noise" if sqnr is None else f"{sqnr:.1f} dB")
        )


def _within(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def export_leg(distill: Facts) -> Leg:
    """The leg that distill measured."""
    values = {k: distill["export"][k] for k in ("max_abs_logit_difference", "top1_agreement")}
    return Leg("export", "torch student", "ONNX student in onnxruntime", distill["n_val"], values)


def int8_leg(calibrate: Mapping[str, Any]) -> Leg:
    """The leg that calibrate measured."""
    values = {
        "top1_float": calibrate["top1_val_float"],
        "top1_int8": calibrate["top1_val_int8"],
        "loss_points": calibrate["int8_loss_points"],
        "loss_interval95_points": calibrate["int8_loss_interval95_points"],
        "top1_agreement": calibrate["top1_agreement"],
        "cosine_mean": calibrate["logits_cosine_mean"],
        "cosine_min": calibrate["logits_cosine_min"],
        "sqnr_db": calibrate["logits_sqnr_db"],
    }
    target = f"int8 on the host ({calibrate['backend']}, {calibrate['measured_on']})"
    return Leg("int8", "float ONNX", target, calibrate["n_val"], values)
