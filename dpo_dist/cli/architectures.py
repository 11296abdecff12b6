"""What the models' architectures can do: be trained here at all, and how long a sequence they can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset

if TYPE_CHECKING:
    from dpo_dist.model import Probe
else:
    Probe = Any  # of a layer that imports model classes


@dataclass(frozen=True)
class Architecture:
    """Policy or reference, as far as its configuration tells."""

    key: str  # the dotted path that its folder was written under
    config: PretrainedConfig
    tried: Probe  # what a small model of it told

    @property
    def max_positions(self) -> int | None:
        """How many positions it was made for."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def require_positions(
    architectures: Sequence[Architecture], datasets: Mapping[str, TokenizedDataset], num_virtual: int
) -> None:
    """Refuse a row that is longer than a table of learned positions.

    Args:
        architectures: all models of a run.
        datasets: by the key that they were written under.
        num_virtual: tokens that an adapter puts before every prompt.
    Raises:
        DataError: naming the row, its positions and the model's.
    """
    for model in architectures:
        limit = model.max_positions if model.tried.has_position_table else None
        for key, dataset in datasets.items():
            length, row = dataset.longest_sequence()
            needed = length - 1 + num_virtual  # nothing is predicted from the last token
            if limit is not None and needed > limit:
                raise DataError(
                    f"{dataset.source_of(row)}: this row of {key} needs {needed} positions, and architecture "
                    f"{model.config.model_type} ({model.key}) has {limit}; set data.max_length={limit - num_virtual} "
                    "with data.truncation_mode, or take a model that reads more"
                )


def architecture_remarks(architectures: Sequence[Architecture], datasets: Mapping[str, TokenizedDataset]) -> list[str]:
    """Architectures that could not be tried, a loss that is left out, rows that are longer than a model was made for.

    A sentence each.
    """
    found = [
        f"{model.key}: architecture {model.config.model_type} could not be tried on a small model "
        f"({model.tried.untried}); the self-check at the start of the run decides whether it can be trained"
        for model in architectures
        if model.tried.untried
    ]
    found += [
        f"{model.key}: its configuration asks for the auxiliary loss of its router (output_router_logits=true), which "
        "is no part of DPO: it is left out here, and TRL adds it"
        for model in architectures[:1]  # a reference has no loss
        if getattr(model.config.get_text_config(), "output_router_logits", False)
    ]
    for model in architectures:
        limit = model.max_positions
        for key, dataset in datasets.items():
            length, row = dataset.longest_sequence()
            if limit is not None and length > limit:
                found.append(
                    f"{key}: the longest row has {length} tokens ({dataset.source_of(row)}), and {model.key} was made "
                    f"for {limit} (max_position_embeddings)"
                )
    return found
