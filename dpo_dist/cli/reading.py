"""The tokenizer and the data sets of a configuration."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dpo_dist.config import DataSource, RunConfig
from dpo_dist.demo import demo_model_folder
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, load_tokenizer, prepare_dataset


def tokenizer_of(config: RunConfig, model_folder: Path, cache_dir: Path) -> TokenizerSpec:
    """The tokenizer that the configuration names, or that of its model."""
    model = config.model
    if model.tokenizer_name_or_path is None:
        return TokenizerSpec(str(model_folder), None, model.trust_remote_code, "model.model_name_or_path")
    is_demo = model.tokenizer_name_or_path == "demo"
    path = str(demo_model_folder(cache_dir)) if is_demo else model.tokenizer_name_or_path
    return TokenizerSpec(path, None, model.trust_remote_code, "model.tokenizer_name_or_path")


def tokenizer_if_any(spec: TokenizerSpec) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where the folder of a model has none, as is enough for token ids."""
    folder = Path(spec.path)
    has_one = not folder.is_dir() or (folder / "tokenizer.json").is_file()
    return load_tokenizer(spec) if has_one else None


def training_set(
    config: RunConfig, tokenizer: TokenizerSpec, model_config: PretrainedConfig, cache_dir: Path
) -> TokenizedDataset:
    """The data set of all entries of data.train, tokenised now or before."""
    return _dataset(config, config.data.train, tokenizer, model_config, cache_dir, "data.train", 0)


def held_out_sets(
    config: RunConfig, tokenizer: TokenizerSpec, model_config: PretrainedConfig, cache_dir: Path
) -> dict[str, TokenizedDataset]:
    """That of each entry of data.evaluation, by its name."""
    named = zip(config.data.evaluation_names, config.data.evaluation, strict=True)
    return {
        name: _dataset(config, [source], tokenizer, model_config, cache_dir, "data.evaluation", index)
        for index, (name, source) in enumerate(named)
    }


def _dataset(
    config: RunConfig,
    sources: list[DataSource],
    tokenizer: TokenizerSpec,
    model_config: PretrainedConfig,
    cache_dir: Path,
    section: str,
    first_index: int,
) -> TokenizedDataset:
    dataset = prepare_dataset(
        sources,
        config.data,
        tokenizer,
        cache_dir / "data",
        section=section,
        first_index=first_index,
        demonstrations=config.trains_on_demonstrations,
    )
    dataset.check_vocabulary(model_config.vocab_size)
    return dataset
