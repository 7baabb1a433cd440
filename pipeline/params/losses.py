"""The table of soft losses: what a student can learn from a teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union, cast

from msgspec import Meta, defstruct
from msgspec.structs import asdict

from pipeline.run.errors import ConfigError
from pipeline.run.parameters import Params

Weight = Annotated[float, Meta(ge=0)]


class SoftLoss(Params, frozen=True):
    """A kind of soft loss; each of its fields weighs a part of it."""

    function: ClassVar[str]  # `module:name` of the function that computes it
    term: ClassVar[str]  # what reports call it in the sum of losses

    @property
    def name(self) -> str:
        """Its name in `LOSSES`."""
        return str(self.__struct_config__.tag)

    @property
    def weights(self) -> dict[str, float]:
        """By name, the weights of its parts."""
        return asdict(self)


def _soft_loss(name: str, term: str, function: str, **weights: float) -> type[SoftLoss]:
    """A kind of soft loss, from its name, its term in reports, and its weights' defaults."""
    kind = defstruct(
        f"{name.capitalize()}Loss",
        [(weight, Weight, default) for weight, default in weights.items()],
        bases=(SoftLoss,),
        namespace={"__doc__": term, "function": function, "term": term},
        tag=name,
        tag_field="name",
        frozen=True,
        forbid_unknown_fields=True,
    )
    return cast("type[SoftLoss]", kind)


_ROOM = "pipeline.training.losses"

#: Every soft loss; a new one is a line here and a file with its function there.
_KINDS = (
    _soft_loss("kl", "T^2 * KL", f"{_ROOM}.kl:kl_loss"),
    _soft_loss("dkd", "DKD", f"{_ROOM}.dkd:dkd_loss", target_weight=1.0, nontarget_weight=8.0),
    _soft_loss("dist", "DIST", f"{_ROOM}.dist:dist_loss", inter_weight=1.0, intra_weight=1.0),
)

#: The kinds of soft loss by the names that `distill.loss` gives them.
LOSSES: dict[str, type[SoftLoss]] = {str(kind.__struct_config__.tag): kind for kind in _KINDS}

if TYPE_CHECKING:
    AnySoftLoss = SoftLoss
else:
    AnySoftLoss = Union[_KINDS]  # noqa: UP007 - of as many as there are

#: Weights that stood in `distill` beside the name of their loss until release 0.1.
OLD_WEIGHTS: dict[str, tuple[str, float]] = {
    name: (loss, weight)
    for loss in ("dkd", "dist")
    for name, weight in LOSSES[loss]().weights.items()
}


def gather_loss(section: dict[str, Any]) -> dict[str, Any]:
    """The section `distill` with its loss as a mapping that holds the loss's own weights.

    A name alone stands for that loss with its defaults. The weights of earlier releases are moved
    into the mapping.

    Raises:
        ConfigError: a weight of another loss; a weight that is given twice.
    """
    loss = section.get("loss", "kl")
    loss = (
        {"name": loss} if isinstance(loss, str) else dict(loss) if isinstance(loss, dict) else loss
    )
    section = {**section, "loss": loss}
    for name, (owner, default) in OLD_WEIGHTS.items():
        if name not in section or not isinstance(loss, dict):
            continue
        weight = section.pop(name)
        if loss.get("name") != owner:
            if weight != default:
                raise ConfigError(
                    f"{name} is for loss {owner} only: write loss: "
                    f"{{name: {owner}, {name}: {weight}}}, or leave it out"
                )
        elif name in loss:
            raise ConfigError(f"{name} is in distill.loss too; leave this one out")
        else:
            loss[name] = weight
    return section
