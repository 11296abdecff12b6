"""What a DeepSpeed file may hold (0.19.8), what is refused with which owner, and at which ZeRO stages a key is read.

Kept by hand because DeepSpeed imports torch; `tests/unit/test_deepspeed_configs.py` compares it with DeepSpeed's own
models.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["flag", "count", "dtype", "device", "text", "list"]
ALL_STAGES = frozenset({0, 1, 2, 3})
SHARDED = frozenset({1, 2, 3})
STAGES_1_2 = frozenset({1, 2})
STAGE_3 = frozenset({3})

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Allowed:
    """A key DeepSpeed reads: the kind of its value, or the keys below it, and the stages at which it has an effect."""

    kind: Kind = "flag"
    stages: frozenset[int] = ALL_STAGES
    below: "dict[str, Allowed | str] | None" = None
    is_promise: bool = False
    """Whether a run that does not read it takes more memory or computes other numbers than its author believes; else
    it decides how fast the stages that read it are, and at another stage there is nothing to decide."""


_CHECKPOINTS = "checkpoints are saved and loaded by dpo_dist; leave it out"
_EXPORT = "the trained model is written to model/ without it; leave it out"
_DTYPE = "the dtype is model.dtype"
_MASTER = "master weights and optimizer state are float32 always; leave it out"
_OPTIMIZER = (
    "the optimizer is AdamW, set by train.learning_rate, train.adam_beta1, train.adam_beta2, train.weight_decay"
)
_BATCH = "the batch is train.examples_per_step and packing.max_tokens"
_AVERAGE = "how gradients are averaged is fixed: dpo_dist divides by the step's weight itself; leave it out"
_REMOVED = "DeepSpeed 0.19.8 has removed it; leave it out"
_TRACKER = "trackers are log.report_to"
_ACCUMULATION = "accumulation follows from train.examples_per_step and packing.max_tokens"
_PARALLEL = "only ZeRO is used to spread the model; leave it out"
_FINITE = "an update that is not finite is never made (health.non_finite); leave it out"
_UNREAD = "DeepSpeed 0.19.8 never reads it; leave it out"
_DATA = "data are read and ordered by dpo_dist; leave it out"
_BUFFERS = "policy and reference must compute alike; leave it out"
_ALGORITHM = "it changes the optimizer's algorithm; leave it out"

ZERO: dict[str, Allowed | str] = {
    "stage": Allowed("count"),
    "contiguous_gradients": Allowed("flag", SHARDED),
    "reduce_scatter": Allowed("flag", SHARDED),
    "reduce_bucket_size": Allowed("count", SHARDED),
    "overlap_comm": Allowed("flag", SHARDED),
    "use_multi_rank_bucket_allreduce": Allowed("flag", STAGES_1_2),
    "allgather_bucket_size": Allowed("count", STAGES_1_2),
    "ignore_unused_parameters": Allowed("flag", STAGES_1_2),
    "round_robin_gradients": Allowed("flag", STAGES_1_2),
    "parameter_alignment": Allowed("flag", STAGES_1_2),
    "sub_group_size": Allowed("count", STAGE_3),
    "stage3_prefetch_bucket_size": Allowed("count", STAGE_3),
    "stage3_param_persistence_threshold": Allowed("count", STAGE_3),
    "stage3_model_persistence_threshold": Allowed("count", STAGE_3),
    "stage3_max_live_parameters": Allowed("count", STAGE_3, is_promise=True),
    "stage3_max_reuse_distance": Allowed("count", STAGE_3),
    "stage3_module_granularity_threshold": Allowed("count", STAGE_3),
    "stage3_use_all_reduce_for_fetch_params": Allowed("flag", STAGE_3),
    "stage3_allgather_sequential": Allowed("flag", STAGE_3),
    "zero_quantized_weights": Allowed("flag", STAGE_3, is_promise=True),
    "zero_quantized_nontrainable_weights": Allowed("flag", STAGE_3, is_promise=True),
    "zero_quantized_gradients": Allowed("flag", STAGE_3, is_promise=True),
    "memory_efficient_linear": Allowed("flag", STAGE_3, is_promise=True),
    "override_module_apply": Allowed("flag", STAGE_3),
    "log_trace_cache_warnings": Allowed("flag", STAGE_3),
    "enable_sanity_checks": Allowed("flag", STAGE_3),
    "leaf_module": Allowed(
        stages=STAGE_3, below={"classes": Allowed("list"), "names": Allowed("list"), "name_suffixes": Allowed("list")}
    ),
    "offload_param": Allowed(
        stages=STAGE_3,
        is_promise=True,
        below={
            "device": Allowed("device"),
            "nvme_path": Allowed("text"),
            "buffer_count": Allowed("count"),
            "buffer_size": Allowed("count"),
            "max_in_cpu": Allowed("count"),
            "pin_memory": Allowed("flag"),
        },
    ),
    "offload_optimizer": Allowed(
        stages=SHARDED,
        is_promise=True,
        below={
            "device": Allowed("device"),
            "nvme_path": Allowed("text"),
            "buffer_count": Allowed("count"),
            "pin_memory": Allowed("flag"),
            "pipeline_read": Allowed("flag"),
            "pipeline_write": Allowed("flag"),
            "fast_init": Allowed("flag"),
            "ratio": _ALGORITHM,
            "super_offload": _ALGORITHM,
            "cpuadam_cores_perc": _ALGORITHM,
        },
    ),
    "zero_hpz_partition_size": (
        "DeepSpeed 0.19.8 makes its groups for one sharded model in a process: for the reference, see "
        "reference.zero_hpz_partition_size; leave it out here"
    ),
    "allgather_partitions": _UNREAD,
    "compute_grad_norm": "the gradient's norm is needed for train.max_grad_norm; leave it out",
    "cpu_offload": "the name is zero_optimization.offload_optimizer",
    "cpu_offload_param": "the name is zero_optimization.offload_param",
    "cpu_offload_use_pin_memory": "the name is pin_memory, in offload_optimizer and offload_param",
    "elastic_checkpoint": _CHECKPOINTS,
    "load_from_fp32_weights": _CHECKPOINTS,
    "pipeline_loading_checkpoint": _CHECKPOINTS,
    "stage3_gather_16bit_weights_on_model_save": _EXPORT,
    "stage3_gather_fp16_weights_on_model_save": _EXPORT,
    "legacy_stage1": _REMOVED,
    "save_muon_momentum_buffer_in_memory": _OPTIMIZER,
    "zenflow": _ALGORITHM,
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
}

BF16: dict[str, Allowed | str] = {
    "enabled": _DTYPE,
    "check_grad_overflow": _FINITE,
    "immediate_grad_update": Allowed("flag"),
    "bf16_master_weights_and_grads": _MASTER,
    "bf16_optimizer_states": _MASTER,
}

FP16: dict[str, Allowed | str] = {
    "enabled": _DTYPE,
    "auto_cast": _DTYPE,
    "loss_scale": Allowed("count"),
    "initial_scale_power": Allowed("count"),
    "loss_scale_window": Allowed("count"),
    "hysteresis": Allowed("count"),
    "consecutive_hysteresis": Allowed("flag"),
    "min_loss_scale": Allowed("count"),
    "fp16_master_weights_and_grads": _MASTER,
}

FILE: dict[str, Allowed | str] = {
    "zero_optimization": Allowed(below=ZERO),
    "bf16": Allowed(below=BF16),
    "fp16": Allowed(below=FP16),
    "communication_data_type": Allowed("dtype"),
    "data_types": Allowed(
        below={
            "grad_accum_dtype": Allowed("dtype"),
            "param_dtype": _DTYPE,
            "buffer_dtype": _BUFFERS,
            "keep_in_fp32_modules": _BUFFERS,
        }
    ),
    "aio": Allowed(
        stages=STAGE_3,
        below={
            "block_size": Allowed("count"),
            "queue_depth": Allowed("count"),
            "intra_op_parallelism": Allowed("count"),
            "single_submit": Allowed("flag"),
            "overlap_events": Allowed("flag"),
            "use_gds": Allowed("flag"),
        },
    ),
    "comms_logger": Allowed(
        below={
            "enabled": Allowed("flag"),
            "verbose": Allowed("flag"),
            "prof_all": Allowed("flag"),
            "prof_ops": Allowed("list"),
            "debug": Allowed("flag"),
        }
    ),
    "wall_clock_breakdown": Allowed("flag"),
    "memory_breakdown": Allowed("flag"),
    "dump_state": Allowed("flag"),
    "log_level": Allowed("text"),
    "disable_python_gc": Allowed("flag"),
    "optimizer": _OPTIMIZER,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "scheduler": "the schedule is train.lr_scheduler_type and train.warmup_steps",
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _ACCUMULATION,
    "managed_gradient_accumulation": _ACCUMULATION,
    "gradient_clipping": "the largest norm of the gradient is train.max_grad_norm",
    "steps_per_print": "the interval is log.logging_steps",
    "activation_checkpointing": "recomputing activations is model.gradient_checkpointing",
    "bfloat16": _DTYPE,
    "torch_autocast": _DTYPE,
    "weight_quantization": _DTYPE,
    "prescale_gradients": _AVERAGE,
    "gradient_predivide_factor": _AVERAGE,
    "gradient_allreduce_op": _AVERAGE,
    "disable_allgather": _UNREAD,
    "vocabulary_size": _UNREAD,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "pipeline": _PARALLEL,
    "hybrid_engine": _PARALLEL,
    "compile": "the model is not compiled: its batches differ in shape; leave it out",
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    "autotuning": "dpo_dist is not run by DeepSpeed's tuner; leave it out",
    "flops_profiler": "it wraps functions the packed forward does not use; leave it out",
    "timers": "times are in metrics.jsonl; leave it out",
    "tensorboard": _TRACKER,
    "wandb": _TRACKER,
    "csv_monitor": _TRACKER,
    "comet": _TRACKER,
    "elasticity": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
}
