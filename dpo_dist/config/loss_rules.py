"""Rules of the section `loss`, as in `rules.py`: a parameter that no chosen loss reads is an error."""

from collections.abc import Iterator

from dpo_dist.config.loss import LOSS_TYPES, NO_REFERENCE, OF_RATINGS, LossConfig
from dpo_dist.config.models import RunConfig
from dpo_dist.config.source_rules import Broken, KeyPath, Unread

# Parameters of losses -> the losses that read them. Equal to the table in `losses` by a test.
READ_BY: dict[str, tuple[str, ...]] = {
    "beta": tuple(name for name in LOSS_TYPES if name != "sft"),
    "label_smoothing": ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
    "rdpo_alpha": ("sigmoid",),
    "odpo_alpha": ("sigmoid",),
    "dpop_lambda": ("dpop",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "desirable_weight": OF_RATINGS,
    "undesirable_weight": OF_RATINGS,
}
# Losses of the difference of two scores: what an f-divergence leaves undetermined is the same for both of a prompt's
# completions, and cancels in nothing else.
OF_A_DIFFERENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
# Losses of which not everything belongs to a single pair.
NOT_WEIGHTED = ("aot", "aot_unpaired", "cpo", "orpo", "plackett_luce", "sft", *OF_RATINGS)


def loss_keys_without_effect(config: RunConfig) -> dict[KeyPath, Unread]:
    """As `rules.keys_without_effect`, of this section."""
    loss, cause = config.loss, ("loss", "loss_type")
    found: dict[KeyPath, Unread] = {}
    chosen = " and ".join(loss.loss_types)
    for key, readers in READ_BY.items():
        if not set(readers) & set(loss.loss_types):
            why = f"has no effect with loss.loss_type={chosen}; {_listed(readers)} {_read(readers)} it: leave this out"
            found["loss", key] = Unread(cause, why)
    if len(loss.loss_types) == 1:
        found["loss", "loss_weights"] = Unread(
            cause,
            f"has no effect with one loss; leave this out, or let loss.loss_type be a list: [{chosen}, ...]",
            same_result=loss.loss_weights == [1.0],
        )
    if loss.f_divergence_type != "alpha_divergence":
        found["loss", "f_alpha_divergence_coef"] = Unread(
            ("loss", "f_divergence_type"),
            f"has no effect with loss.f_divergence_type={loss.f_divergence_type}; alpha_divergence reads it: leave "
            "this out",
        )
    if config.trains_on_demonstrations:
        for key in ("pairing", "group_by_prompt"):
            why = f"has no effect with loss.loss_type={chosen} and no reference: nothing is compared; leave this out"
            found["data", key] = Unread(cause, why)
    return found


def loss_rules(config: RunConfig) -> Iterator[Broken]:
    """Every rule of this section that a configuration of valid values breaks."""
    loss, cause = config.loss, ("loss", "loss_type")
    if len(set(loss.loss_types)) != len(loss.loss_types):
        yield cause, (), "names a loss twice; name each once, and set loss.loss_weights"
    if loss.loss_weights is not None and 1 < len(loss.loss_types) != len(loss.loss_weights):
        numbers = f"{len(loss.loss_weights)} weights for {len(loss.loss_types)} losses"
        yield ("loss", "loss_weights"), (cause,), f"gives {numbers}; give one for each, or leave it out"
    yield from _smoothing_rules(loss)
    yield from _token_rules(config)
    yield from _rating_rules(config)
    if loss.beyond_a_cache and (config.reference.source == "cache" or config.reference.cache_dir is not None):
        key, what = loss.beyond_a_cache
        why = f"needs the reference's {what}; use live, adapter_off or auto"
        yield ("loss", key), (("reference", "source"),), why
    yield from _list_rules(config)
    others = [name for name in loss.loss_types if name not in OF_A_DIFFERENCE]
    if loss.f_divergence_type != "reverse_kl" and others:
        yield (
            ("loss", "f_divergence_type"),
            (cause,),
            f"does not go with {_listed(others)}: only for losses of a difference of two scores does a divergence "
            f"other than reverse_kl say anything ({', '.join(OF_A_DIFFERENCE)}); leave it out",
        )


def _smoothing_rules(loss: LossConfig) -> Iterator[Broken]:
    if "exo_pair" in loss.loss_types and loss.label_smoothing == 0:
        yield (
            ("loss", "loss_type"),
            (("loss", "label_smoothing"),),
            "needs loss.label_smoothing above 0 for exo_pair, whose loss is infinite without it; set it, say to 0.001",
        )


def _token_rules(config: RunConfig) -> Iterator[Broken]:
    """Of what looks at single tokens."""
    loss, cause = config.loss, ("loss", "loss_type")
    others = [name for name in loss.loss_types if name in (*NO_REFERENCE, *OF_RATINGS)]
    if loss.ld_alpha is not None and others:
        yield (
            ("loss", "ld_alpha"),
            (cause,),
            f"does not go with {_listed(others)}, which asks for whole log-probabilities; leave one out",
        )
    if loss.use_weighting and (others := [name for name in loss.loss_types if name in NOT_WEIGHTED]):
        yield (
            ("loss", "use_weighting"),
            (cause,),
            f"does not go with {_listed(others)}: only the loss of a single pair has a weight; leave one out",
        )


def _rating_rules(config: RunConfig) -> Iterator[Broken]:
    """Of losses of completions that are called good or bad."""
    cause = ("loss", "loss_type")
    if config.rated == "all" and config.data.group_by_prompt:
        why = "does not go with a loss of single completions alone, which a prompt's rows are merged for; leave it out"
        yield ("data", "group_by_prompt"), (cause,), why
    if "kto" in config.loss.loss_types and config.train.examples_per_step == 1:
        why = "is 1, and loss.loss_type=kto compares a step's prompts with each other's completions; raise it"
        yield ("train", "examples_per_step"), (cause,), why


def _list_rules(config: RunConfig) -> Iterator[Broken]:
    """Of what looks at all completions of a prompt."""
    data, cause = config.data, ("loss", "loss_type")
    if config.trains_on_demonstrations:
        return
    is_list = "plackett_luce" in config.loss.loss_types
    if data.pairing == "list" and not is_list:
        yield ("data", "pairing"), (cause,), "is for loss.loss_type=plackett_luce; use all for a loss of pairs"
    if is_list and data.pairing not in ("all", "list"):
        yield (
            ("data", "pairing"),
            (cause,),
            "leaves preferences out, and loss.loss_type=plackett_luce is of whole rankings; use list",
        )
    if is_list and data.group_by_prompt:
        yield (
            ("data", "group_by_prompt"),
            (cause,),
            "does not go with loss.loss_type=plackett_luce: pairs from several rows are no ranking; leave one out",
        )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _read(names: tuple[str, ...]) -> str:
    return "reads" if len(names) == 1 else "read"
