"""Where a run's reference log-probabilities come from: decided, built, and told. Shared by all commands."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.attention.interface import register
from dpo_dist.cli.describe import base_model_name, counted
from dpo_dist.cli.prepare import Prepared
from dpo_dist.config import RunConfig
from dpo_dist.distributed import Ranks, StopRequest, broadcast_json
from dpo_dist.engine import InferenceEngine, TrainingEngine, inference_config
from dpo_dist.errors import ConfigError
from dpo_dist.model import four_bits, load_model
from dpo_dist.noise import NOISE_PER_SQRT_TOKEN
from dpo_dist.phases import reach
from dpo_dist.pretrained import num_parameters
from dpo_dist.reference import (
    AdapterOffReference,
    CacheIdentity,
    LiveReference,
    NoReference,
    Reference,
    ReferenceCache,
    Situation,
    Source,
    choose_source,
    numerics_of,
    open_cache,
)

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60.0  # of progress, where a tenth takes longer

Rows = list[np.ndarray | None]


@dataclass(frozen=True)
class Choice:
    """A run's source of reference log-probabilities."""

    source: Source
    reason: str
    cache: ReferenceCache | None  # looked into; None where nobody needs to

    @property
    def text(self) -> str:
        """For people."""
        if self.source != "cache" or self.cache is None:
            return f"{self.source}: {self.reason}"
        found, missing = self.cache.num_found, self.cache.num_missing
        if not missing:
            return f"cache: {self.reason}; all {found} values are in {self.cache.folder}"
        return f"cache: {self.reason}; {found} values found in {self.cache.folder}, {missing} to be computed"


def find_source(prepared: Prepared, ranks: Ranks, cache_dir: Path) -> Choice:
    """Decide on a source. Collective.

    Args:
        prepared: The run.
        ranks: Where this process stands; `world_size` ranks will share the models.
        cache_dir: Where dpo-dist keeps what it computes.
    Raises:
        ConfigError: the cache that was named is of another reference, or no cache.
    """
    config = prepared.config.reference
    reference_deepspeed(prepared, ranks)  # its mistakes are found before anything is loaded
    folder = cache_folder(prepared, cache_dir)
    cache = None
    # Nodes may have caches and memory of their own, and what follows is collective: the first rank decides.
    looks = config.source == "auto" and prepared.config.has_reference and not prepared.config.loss.beyond_a_cache
    if config.source == "cache" or (looks and broadcast_json(folder.exists())):
        cache = open_reference_cache(prepared, ranks, cache_dir, rows_of_run(prepared))
    source, reason = broadcast_json(choose_source(config, _situation(prepared, ranks, cache)))
    if source == "cache" and cache is None:
        cache = open_reference_cache(prepared, ranks, cache_dir, rows_of_run(prepared))
    return Choice(source, reason, cache if source == "cache" else None)


def rows_of_run(prepared: Prepared) -> Rows:
    """Examples of each data set that the run will ask for: a short run does not compute a long data set."""
    steps, sampler = prepared.num_steps, prepared.sampler
    held_out = [None] * len(prepared.evaluation_sets)
    if steps >= sampler.steps_per_epoch:
        return [None, *held_out]
    return [np.array([row for step in range(steps) for row in sampler.examples_of(step)], dtype=np.int64), *held_out]


def open_reference_cache(prepared: Prepared, ranks: Ranks, cache_dir: Path, rows: Rows | None = None) -> ReferenceCache:
    """Look what is stored of some examples. Collective.

    Args:
        prepared, ranks, cache_dir: As in `find_source`.
        rows: Of each data set; None: all.
    Raises:
        ConfigError: as `find_source`.
    """
    dtype, kernel = _kind(prepared)
    identity = CacheIdentity(prepared.reference_identity, dtype, kernel, str(prepared.reference_folder))
    datasets = [prepared.dataset, *prepared.evaluation_sets.values()]
    folder = cache_folder(prepared, cache_dir)
    return open_cache(folder, identity, datasets, ranks, prepared.config.reference.store_token_logps, rows)


def cache_folder(prepared: Prepared, cache_dir: Path) -> Path:
    """Where the stored log-probabilities of this run's reference are."""
    if prepared.config.reference.cache_dir is not None:
        return Path(prepared.config.reference.cache_dir)
    return cache_dir / "reference" / "-".join((prepared.reference_identity, *_kind(prepared)))


def fill_cache(prepared: Prepared, ranks: Ranks, cache: ReferenceCache, stop: StopRequest) -> None:
    """Compute what a cache lacks, and compute some of what it has again. Collective.

    The model that does it has left memory afterwards, before the policy takes its place.

    Raises:
        Stopped: it was asked to stop; what was computed until then is kept.
    """
    rows = prepared.config.reference.verify_rows if cache.num_found else 0
    if not cache.num_missing and not rows:
        return
    engine = reference_engine(prepared, ranks)
    packer = prepared.packer(ranks.world_size)
    if cache.num_missing:
        cache.fill(engine, packer, _progress(ranks, stop))
    if rows:
        verified = cache.verify(engine, packer, rows, NOISE_PER_SQRT_TOKEN[engine.dtype])
        if ranks.is_first:
            logger.info("reference cache: %s computed again, equal up to rounding", counted(verified, "stored value"))
    engine.release()


def reference_deepspeed(prepared: Prepared, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration of a reference with an engine of its own.

    Raises:
        ConfigError: an option has no effect at this ZeRO stage, or does not fit ranks or device.
    """
    reference = prepared.config.reference
    return inference_config(
        prepared.deepspeed,
        prepared.reference_dtype,
        reference.sharded,
        reference.offload_param,
        reference.zero_hpz_partition_size,
        ranks,
    )


def reference_engine(prepared: Prepared, ranks: Ranks) -> InferenceEngine:
    """The reference in memory, for as long as nobody releases it. Collective."""
    config, deepspeed = prepared.config, reference_deepspeed(prepared, ranks)
    attention = register(prepared.reference_attention[0], config.model.deterministic, config.model.torch_compile)
    model = load_model(
        prepared.reference_folder, prepared.reference_config, attention, prepared.reference_dtype, deepspeed,
        gradient_checkpointing=False, trust_remote_code=config.model.trust_remote_code,
        quantization=four_bits(config.adapter, prepared.reference_dtype) if prepared.same_base else None,
        use_liger_kernel=config.model.use_liger_kernel, compilations=prepared.compilations,
    )  # fmt: skip
    if config.adapter.adapter_name_or_path is not None and prepared.same_base:
        from dpo_dist.adapters import attach_adapter

        model = attach_adapter(model, config.adapter, base_model_name(prepared), 0, None, deepspeed)
    return InferenceEngine(model, deepspeed)


def reference_of(
    prepared: Prepared, choice: Choice, engine: InferenceEngine | None, policy: TrainingEngine
) -> Reference:
    """The source as the training loop asks it.

    Args:
        prepared: The run.
        choice: What `find_source` gave; a cache is full by now.
        engine: Of a live reference.
        policy: Without its adapters it may be the reference.
    """
    if choice.cache is not None:
        return choice.cache.reference()
    if engine is not None:
        return LiveReference(engine, prepared.config.reference.per_microbatch)
    if choice.source == "adapter_off":
        return AdapterOffReference(policy)
    return NoReference(policy.device)


def require_reference(config: RunConfig) -> None:
    """Refuse to compute what is not asked for.

    Raises:
        ConfigError: the run has no reference.
    """
    if config.reference.source == "none":
        raise ConfigError("reference.source=none: there is nothing to compute; use auto, live, cache or adapter_off")
    if reason := _beyond_a_cache(config):
        raise ConfigError(f"{reason}: there is nothing to compute; leave it out")
    if not config.has_reference:
        raise ConfigError(
            f"loss.loss_type={' and '.join(config.loss.loss_types)} reads no reference: there is nothing to compute; "
            "set reference.source=cache if the metrics are to be told from one"
        )


def _beyond_a_cache(config: RunConfig) -> str:
    """Why no cache will do, if so."""
    if config.loss.beyond_a_cache is None:
        return ""
    key, what = config.loss.beyond_a_cache
    return f"loss.{key}={getattr(config.loss, key)} needs the reference's {what}"


def _kind(prepared: Prepared) -> tuple[str, str]:
    """What besides the weights decides a stored value: number format; arithmetic and kernel."""
    model, dtype = prepared.config.model, prepared.config.reference.dtype
    kernels = prepared.reference_attention[0], model.use_liger_kernel, model.torch_compile
    return dtype or model.dtype, numerics_of(*kernels)


def _situation(prepared: Prepared, ranks: Ranks, cache: ReferenceCache | None) -> Situation:
    config = prepared.config
    stage = prepared.deepspeed.get("zero_optimization", {}).get("stage", 0)
    share = {name: 1 / ranks.world_size if stage >= least else 1.0 for name, least in _SHARDED_FROM.items()}
    policy, reference = (
        num_parameters(folder) * dtype.itemsize / 2**30
        for folder, dtype in (
            (prepared.model_folder, prepared.dtype),
            (prepared.reference_folder, prepared.reference_dtype),
        )
    )
    masters = 2 * 4 + (4 if prepared.dtype != torch.float32 else 0)  # bytes: two moments, and float32 weights
    state = share["weights"] + share["gradients"] + share["optimizer"] * masters / prepared.dtype.itemsize
    if config.adapter.is_used:
        state = share["weights"]  # what is trained is small
    return Situation(
        has_reference=config.has_reference,
        beyond_a_cache=_beyond_a_cache(config),
        has_adapters=config.adapter.is_used,
        base_is_reference=prepared.same_base,
        passes=_passes(prepared),
        num_rows=cache.num_found + cache.num_missing if cache else 0,
        num_cached=cache.num_found if cache else 0,
        policy_gib=policy * state,
        reference_gib=reference * (share["weights"] if config.reference.sharded else 1.0),
        device_gib=_device_gib(ranks),
    )


# ZeRO stage from which on each part is spread over the ranks.
_SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}


def _passes(prepared: Prepared) -> float:
    """How often the run asks for the average example, held-out ones included."""
    config, steps = prepared.config, prepared.num_steps
    asked = prepared.sampler.examples_seen(steps)
    every = config.evaluation.eval_steps
    evaluations = config.evaluation.eval_on_start + (-(-steps // every) if every else 0)
    held_out = sum(len(dataset) for dataset in prepared.evaluation_sets.values())
    return max(asked / len(prepared.dataset), (asked + evaluations * held_out) / (len(prepared.dataset) + held_out))


def _device_gib(ranks: Ranks) -> float | None:
    """Memory of this rank's device, or of this machine shared among its ranks."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / ranks.ranks_per_node


def _progress(ranks: Ranks, stop: StopRequest) -> Callable[[int, int], None]:
    """A line for every tenth, and one a minute where that takes longer; and after each chunk a look at the signals."""
    started = last = time.monotonic()
    tenths = 0

    def show(done: int, total: int) -> None:
        nonlocal last, tenths
        reach("cache")
        stop.obey()
        now, tenth = time.monotonic(), 10 * done // total
        if not ranks.is_first or (tenth == tenths and now - last < _SECONDS_BETWEEN_LINES):
            return
        last, tenths = now, tenth
        left = (now - started) / done * (total - done)
        then = f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
        logger.info("reference cache: %d of %d values computed, %s", done, total, then)

    return show
