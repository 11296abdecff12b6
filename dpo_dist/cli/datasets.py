"""All data sets of a run: what it trains on, and what it holds out."""

from pathlib import Path

from dpo_dist.config import DataSource, RunConfig
from dpo_dist.data.held_out import Part
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset


def datasets_of(
    config: RunConfig, tokenizer: TokenizerSpec, cache_dir: Path, vocab_size: int
) -> tuple[TokenizedDataset, dict[str, TokenizedDataset]]:
    """The training data, and the held-out sets by their place in the configuration, in the order of their names.

    Raises:
        DataError, ModelError: as `prepare_dataset`; a token id that the model does not have.
    """
    data = config.data

    def one(sources: list[DataSource], section: str, index: int, part: Part) -> TokenizedDataset:
        dataset = prepare_dataset(
            sources,
            data,
            tokenizer,
            cache_dir,
            section=section,
            first_index=index,
            demonstrations=config.trains_on_demonstrations,
            part=part,
        )
        dataset.check_vocabulary(vocab_size)
        return dataset

    training = one(data.train, "data.train", 0, "trained" if data.holdout else "whole")
    held_out = {
        f"data.evaluation.{index}": one([source], "data.evaluation", index, "whole")
        for index, source in enumerate(data.evaluation)
    }
    if data.holdout:
        for index, source in enumerate(data.train):
            held_out[f"data.train.{index}:holdout"] = one([source], "data.train", index, "held_out")
    return training, held_out
