"""The tokenizer and the data sets of a configuration."""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.config import DataSource, RunConfig
from dpo_dist.data.held_out import Part
from dpo_dist.demo import demo_model_folder
from dpo_dist.errors import NothingHeldOutError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, load_tokenizer, prepare_dataset

logger = logging.getLogger(__name__)


def tokenizer_of(config: RunConfig, model_folder: Path, cache_dir: Path) -> TokenizerSpec:
    """The tokenizer that the configuration names, or that of its model."""
    model, template = config.model, config.data.chat_template
    if model.tokenizer_name_or_path is None:
        return TokenizerSpec(str(model_folder), None, model.trust_remote_code, "model.model_name_or_path", template)
    is_demo = model.tokenizer_name_or_path == "demo"
    path = str(demo_model_folder(cache_dir)) if is_demo else model.tokenizer_name_or_path
    return TokenizerSpec(path, None, model.trust_remote_code, "model.tokenizer_name_or_path", template)


def tokenizer_if_any(spec: TokenizerSpec) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where the folder of a model has none, as is enough for token ids."""
    folder = Path(spec.path)
    has_one = not folder.is_dir() or (folder / "tokenizer.json").is_file()
    return load_tokenizer(spec) if has_one else None


@dataclass(frozen=True)
class DataSets:
    """All data sets of a run."""

    training: TokenizedDataset
    held_out: dict[str, TokenizedDataset]
    """By their names in metrics."""
    places: dict[str, TokenizedDataset]
    """All of them by their place in the configuration, the training data first."""


def datasets_of(config: RunConfig, tokenizer: TokenizerSpec, cache_dir: Path, vocab_size: int) -> DataSets:
    """Tokenise all data of a run, or find them in the cache.

    A part of data.train of which data.holdout holds out no prompt is passed over, with a warning, as long as there is
    another held-out set, and nothing is decided by that one.

    Raises:
        DataError, ModelError: as `prepare_dataset`; a token id that the model does not have.
    """
    data, names = config.data, config.data.evaluation_names

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
            rated=config.rated,
        )
        dataset.check_vocabulary(vocab_size)
        return dataset

    training = one(data.train, "data.train", 0, "trained" if data.holdout else "whole")
    held_out: dict[str, TokenizedDataset] = {}
    places = {"data.train": training}
    for index, source in enumerate(data.evaluation):
        place = f"data.evaluation.{index}"
        held_out[names[index]] = places[place] = one([source], "data.evaluation", index, "whole")
    best, empty = config.evaluation.best_of(names), None
    for index, (source, name) in enumerate(zip(data.train, names[len(data.evaluation) :], strict=False)):
        try:
            held_out[name] = places[f"data.train.{index}:holdout"] = one([source], "data.train", index, "held_out")
        except NothingHeldOutError as error:
            if best is not None and best[0] == name:
                raise
            empty = error
            logger.warning("%s; it is not evaluated on its own", str(error).partition("; ")[0])
    if empty is not None and not held_out:
        raise empty
    return DataSets(training, held_out, places)
