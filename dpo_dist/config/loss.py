"""The section `loss`."""

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag

from dpo_dist.config.section import Flag, Number, Section, one_or_many

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
    "aot",
    "aot_unpaired",
    "dpop",
    "simpo",
    "cpo",
    "orpo",
    "plackett_luce",
    "sft",
    "kto",
    "bco",
    "apo_zero_unpaired",
]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
# Losses of the policy's own log-probabilities. Equal to the table in `losses` by a test.
NO_REFERENCE = ("simpo", "cpo", "orpo", "sft")
# Losses of single completions that are called good or bad. The same.
OF_RATINGS = ("kto", "bco", "apo_zero_unpaired")


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
    """Probability that a preference label is wrong: `sigmoid` (conservative DPO), `robust`, `aot`,
    `aot_unpaired`; `exo_pair` needs it."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What keeps the policy near the reference (f-DPO). The score f'(ratio) of a completion takes the place of its
    log-ratio, for losses of the difference of two scores."""
    f_alpha_divergence_coef: Number = 0.5
    """alpha of `alpha_divergence`; 1 is reverse_kl."""
    discopop_tau: Annotated[Number, Field(gt=0)] = 0.05
    """Temperature at which `discopop` goes from its logistic to its exponential part."""
    ld_alpha: Annotated[Number, Field(ge=0, le=1)] | None = None
    """LD-DPO (arXiv:2409.06411): weight of the tokens that a completion has beyond the shorter one of its pair, for
    policy and reference, metrics included. null: 1, all of them count alike."""
    use_weighting: Flag = False
    """WPO (arXiv:2406.11827, eq. 2): multiply the loss of a pair by how likely the policy is to write its completions
    itself: exp(mean over tokens of log p(token) - log sum of p^2), of chosen times rejected, without gradient."""
    rdpo_alpha: Annotated[Number, Field(ge=0)] = 0.0
    """R-DPO, for `sigmoid`: nats that the margin of a pair is given for each token that its chosen completion is longer
    than the rejected one, so that a longer answer need not be told apart by its length."""
    odpo_alpha: Annotated[Number, Field(ge=0)] = 0.0
    """ODPO, for `sigmoid`: nats that a pair's margin is to be above 0 for each unit of the data's margin: of the column
    `margin`, or the difference of two `scores`."""
    dpop_lambda: Annotated[Number, Field(gt=0)] = 50.0
    """`dpop`: cost of each nat that a chosen completion lies below the reference, in nats of the log-ratio."""
    simpo_gamma: Annotated[Number, Field(ge=0)] = 0.5
    """`simpo`: margin that is aimed at, after beta."""
    cpo_alpha: Annotated[Number, Field(ge=0)] = 1.0
    """`cpo`: factor of its likelihood term. 0: none."""
    desirable_weight: Annotated[Number, Field(gt=0)] = 1.0
    """`kto`, `bco`, `apo_zero_unpaired`: factor of the loss of completions that are called good."""
    undesirable_weight: Annotated[Number, Field(gt=0)] = 1.0
    """The same of those that are called bad. KTO (arXiv:2402.01306, eq. 8) wants desirable_weight times good
    completions to be 1 to 1.33 times undesirable_weight times bad ones."""

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The losses that are added up."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def reads_a_reference(self) -> bool:
        """Whether any of them compares the policy with a reference."""
        return not set(self.loss_types) <= set(NO_REFERENCE)

    @property
    def beyond_a_cache(self) -> tuple[str, str] | None:
        """The key that asks the reference for more than a sum for each completion of the data, and for what."""
        if self.ld_alpha is not None:
            return "ld_alpha", "value of every token, and a cache gives sums"
        if "kto" in self.loss_types:
            return "loss_type", "values of completions after other prompts, and a cache knows their own"
        return None

    @property
    def rates_completions(self) -> bool:
        """Whether any of them is of single completions that are called good or bad."""
        return bool(set(self.loss_types) & set(OF_RATINGS))

    @property
    def compares(self) -> bool:
        """Whether any of them compares the completions of a prompt with each other."""
        return not set(self.loss_types) <= {"sft", *OF_RATINGS}

    @property
    def weights(self) -> tuple[float, ...]:
        """Their factors."""
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else tuple(self.loss_weights)
