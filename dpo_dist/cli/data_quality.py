"""What `dpo-dist check` says of a run's data: repeated and contradicting pairs, lengths, prompts on both sides."""

from collections.abc import Callable, Mapping

import numpy as np

from dpo_dist.cli.describe import counted
from dpo_dist.quality import digests, find_faults, share_of_longer
from dpo_dist.reference.keys import DistinctKeys, dataset_keys
from dpo_dist.tokenization import TokenizedDataset

_SHOWN = 3  # places
_LOPSIDED = 0.75  # a rule that knows the lengths alone is right so often


def describe_quality(dataset: TokenizedDataset) -> list[str]:
    """The pairs of a data set, a sentence each; none of demonstrations."""
    example_P, chosen_P, rejected_P = dataset.pair_columns()
    if not len(example_P):
        return []
    number_of = DistinctKeys(dataset_keys([dataset])).group
    chosen, rejected = number_of[chosen_P], number_of[rejected_P]
    prompts = len(DistinctKeys(_prompts(dataset)))
    lengths = dataset.learned_lengths.flat
    longer = share_of_longer(lengths[chosen_P], lengths[rejected_P])
    of_lengths = "" if longer is None else f"; chosen is the longer one in {longer:.0%} of those that differ in length"
    found = [f"{counted(len(chosen), 'pair')} of {counted(prompts, 'different prompt')}{of_lengths}"]
    if longer is not None and max(longer, 1 - longer) >= _LOPSIDED:
        kind = "longer" if longer > 0.5 else "shorter"
        found.append(
            f"note: the {kind} completion is chosen so often that a model may learn the length instead of the quality; "
            "rewards/accuracies do not tell the two apart (loss_type=sigmoid_norm averages over tokens)"
        )
    faults = find_faults(chosen, rejected)

    def places(pairs: np.ndarray) -> str:
        return _places(example_P[pairs], dataset.source_of)

    if len(faults.repeated):
        found.append(f"note: {counted(len(faults.repeated), 'pair')} said before, as in {places(faults.repeated)}")
    if len(faults.contradicting):
        number = counted(len(faults.contradicting), "pair")
        found.append(f"note: {number} contradict each other, as in {places(faults.contradicting)}")
    return found


def describe_leaks(datasets: Mapping[str, TokenizedDataset]) -> list[str]:
    """Prompts of held-out sets that are trained on, a sentence for each set that has some.

    Args:
        datasets: by name; the first one is trained on.
    """
    (_, training), *held_out = datasets.items()
    trained, found = DistinctKeys(_prompts(training)), []
    for name, dataset in held_out:
        shared = np.flatnonzero(trained.find(_prompts(dataset)) >= 0)
        if len(shared):
            number = counted(len(shared), "example")
            found.append(
                f"{name}: the prompt of {number} of {len(dataset)} is trained on too, as in "
                f"{_places(shared, dataset.source_of)}; what they measure is not new to the model"
            )
    return found


def _prompts(dataset: TokenizedDataset) -> np.ndarray:
    return np.concatenate([digests(columns.prompt_ids, columns.prompt_starts) for columns in dataset.id_columns()])


def _places(examples: np.ndarray, source_of: Callable[[int], str]) -> str:
    first = list(dict.fromkeys(source_of(int(example)) for example in examples[: 4 * _SHOWN]))
    return ", ".join(first[:_SHOWN])
