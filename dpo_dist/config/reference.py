"""The section `reference`."""

from typing import Annotated, Literal

from pydantic import Field

from dpo_dist.config.section import Flag, Number, Section, Text


class ReferenceConfig(Section):
    """Where the reference's log-probabilities come from."""

    source: Literal["auto", "live", "cache", "adapter_off", "none"] = "auto"
    """`live`: a second, sharded engine in the same step; `cache`: computed once and kept on disk, row by row;
    `adapter_off`: the policy with its adapters switched off; `none`: no reference, its log-probabilities count as 0;
    `auto`: the cheapest of the first three for this run, chosen from epochs, adapters, memory and existing cache;
    `none` where no loss reads a reference and no other option asks for one."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Number format of the reference's forward pass, for `live` and `cache`. null: model.dtype. In another format the
    first loss is not exactly its closed form."""
    per_microbatch: Flag = False
    """`live`: ask the reference in the policy's own micro-batches instead of larger bins: policy and reference then
    round alike, and under ZeRO-3 every micro-batch gathers the reference's weights once more."""
    sharded: Flag = True
    """`live` and `cache` under ZeRO-3: shard the reference over all ranks, as the policy. false: every rank keeps the
    whole of it, and none of its weights is ever gathered."""
    offload_param: Flag = False
    """`live` and `cache` under ZeRO-3: keep the reference's shards in host memory, and copy them to the GPU when a
    layer needs them."""
    zero_hpz_partition_size: Annotated[int, Field(ge=2)] | None = None
    """`live` under ZeRO-3: ranks of a node that keep a whole copy of the reference among themselves, so that its
    weights are gathered between nodes only once. null: sharded over all ranks."""
    cache_dir: Text | None = None
    """`cache`: the folder with the stored log-probabilities of this one reference; made if it does not exist. null: a
    folder for each reference below the cache folder of dpo-dist."""
    verify_rows: Annotated[int, Field(ge=0)] = 8
    """`cache`: compute this many stored rows again at the start, and refuse the cache where they differ by more than
    rounding. 0: trust it."""
    store_token_logps: Flag = False
    """`cache`: keep the log-probability of every token as well, 4 bytes each."""
    sync_ref_model: Flag = False
    """`live`: let the reference follow the policy (TR-DPO): every ref_model_sync_steps updates it becomes
    ref_model_mixup_alpha * policy + (1 - ref_model_mixup_alpha) * reference."""
    ref_model_mixup_alpha: Annotated[Number, Field(gt=0, le=1)] = 0.6
    """Share of the policy in the reference at a synchronisation (sync_ref_model). 1: a copy of the policy."""
    ref_model_sync_steps: Annotated[int, Field(ge=1)] = 512
    """Updates between two synchronisations (sync_ref_model)."""
