"""What is written of a trained model beside its weights, and the model as others read it."""

from collections.abc import Callable
from pathlib import Path

from dpo_dist.checkpoint import export_model, write_assets
from dpo_dist.cli.prepare import Prepared
from dpo_dist.engine import TrainingEngine
from dpo_dist.metrics import MetricsFile
from dpo_dist.run import Run
from dpo_dist.tokenization import load_tokenizer


def asset_writer(prepared: Prepared, policy: TrainingEngine, metrics: MetricsFile) -> Callable[[Path], None]:
    """What writes the files of a checkpoint that stand beside its shards."""

    def write(checkpoint: Path) -> None:
        metrics.write_checksums(checkpoint)
        assets = checkpoint / "model_assets"
        write_assets(assets, policy.model.export_config(), _tokenizer(prepared), _generation(policy), prepared.dtype)
        if policy.model.adapter is not None:
            from dpo_dist.adapters import write_adapter_settings

            write_adapter_settings(assets, policy.model.adapter)

    return write


def write_model(prepared: Prepared, run: Run, out: Path) -> None:
    """Write the trained model, or adapter, for transformers. Every rank must call it."""
    model = run.policy.model
    if model.adapter is not None:
        from dpo_dist.adapters import export_adapter

        parameters = run.policy.named_adapter_parameters()
        export_adapter(out, parameters, run.ranks, model.adapter, _tokenizer(prepared))
        return
    export_model(
        out,
        run.policy.named_full_parameters(),
        run.ranks,
        model.export_config(),
        _tokenizer(prepared),
        _generation(run.policy),
        prepared.dtype,
        trust_remote_code=run.config.model.trust_remote_code,
    )


def _tokenizer(prepared: Prepared) -> object | None:
    """The tokenizer to ship with the model; pre-tokenised data may come with a model that has none."""
    folder = Path(prepared.tokenizer.path)
    has_one = not folder.is_dir() or any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(prepared.tokenizer) if has_one else None


def _generation(policy: TrainingEngine) -> object | None:
    return getattr(policy.model.model, "generation_config", None)
