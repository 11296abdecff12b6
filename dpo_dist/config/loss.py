"""The section `loss`."""

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag

from dpo_dist.config.section import Number, Section, one_or_many

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)


class LossConfig(Section):
    """The objective."""

    loss_type: Annotated[
        Annotated[LossType, Tag("one")] | Annotated[list[LossType], Field(min_length=1), Tag("many")],
        Discriminator(one_or_many),
    ] = "sigmoid"
    """One loss, or a list of losses that are added up. docs/losses.md has the formula, source and use of each."""
    loss_weights: list[Annotated[Number, Field(gt=0)]] | None = None
    """Factor of each loss of a list. null: 1 for all."""
    beta: Annotated[Number, Field(gt=0)] = 0.1
    """Inverse temperature: how strongly the policy is held to the reference. Per nat; larger stays closer."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference label is wrong: `sigmoid` (conservative DPO), `robust`; `exo_pair` needs it."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What keeps the policy near the reference (f-DPO). The score f'(ratio) of a completion takes the place of its
    log-ratio, for losses of the difference of two scores."""
    f_alpha_divergence_coef: Number = 0.5
    """alpha of `alpha_divergence`; 1 is reverse_kl."""
    discopop_tau: Annotated[Number, Field(gt=0)] = 0.05
    """Temperature at which `discopop` goes from its logistic to its exponential part."""

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The losses that are added up."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        """Their factors."""
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else tuple(self.loss_weights)
