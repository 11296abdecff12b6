"""The tokenizer and the data sets of a configuration."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.config import DataSource, RunConfig
from dpo_dist.data.held_out import Part
from dpo_dist.demo import demo_model_folder
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, load_tokenizer, prepare_dataset


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
