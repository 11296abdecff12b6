"""Names that TRL, transformers, axolotl, LLaMA-Factory and OpenRLHF use for what is called differently here.

A run that silently ignores `gradient_accumulation_steps` trains something else than its author believes. So every such
name is refused with the name it has here, or with the reason why there is none.
"""

_BATCH = (
    "train.examples_per_step counts the examples of an update over all ranks, packing.max_tokens bounds a micro-batch; "
    "accumulation follows from them"
)
_TEMPERATURE = "the name here is loss.beta"
_DTYPE = "the name here is model.dtype (bfloat16, float16 or float32)"
_DATA = "the name here is data.train: a list of {path, split, limit}"
_LENGTH = "the name here is data.max_length (prompt plus completion)"
_PROMPT = "only data.max_length (prompt plus completion) limits a length; there is no separate limit of one part"
_PACKING = "examples are always packed without padding, up to packing.max_tokens"
_ADAPTER = "the name here is adapter.peft_type (lora, adalora, prefix_tuning, prompt_tuning, p_tuning)"
_ADAPTER_FOLDER = "the name here is adapter.adapter_name_or_path; a frozen copy of it is the reference"
_REFERENCE = "the name here is model.reference_name_or_path (null = the policy's starting weights)"
_MODEL = "the name here is model.model_name_or_path"
_TOKENIZER = "the name here is model.tokenizer_name_or_path"
_CACHE = (
    "the name here is reference.source (auto, live, cache, adapter_off, none); `dpo-dist precompute` fills the cache"
)
_LIKELIHOOD = "add the loss `sft`: loss.loss_type=[sigmoid, sft] with loss.loss_weights=[1, 1]; docs/losses.md"
_WEIGHT = "no loss here has this term; docs/losses.md lists the losses"
_HEAD = "log-probabilities are always computed in chunks without keeping the logits"
_OPTIMIZER = "AdamW is the only optimizer; see train.adam_beta1, adam_beta2, adam_epsilon, weight_decay"
_PARALLEL = "the model is sharded by ZeRO alone; see parallel.deepspeed"
_WORKERS = "data sets are tokenised once, before training; there is no loader to tune"
_NONE = "there is no such option"

_ADAPTER_KEYS = {
    **dict.fromkeys(("use_peft", "peft_config", "lora_task_type", "finetuning_type"), _ADAPTER),
    **dict.fromkeys(
        ("lora_model_dir", "model_adapter_name", "ref_adapter_name", "ref_model_adapters"), _ADAPTER_FOLDER
    ),
    "lora_rank": "the name here is adapter.lora_r",
    "lora_dropout": "dropout is always off, in adapters too: policy and reference must compute alike",
    "lora_target": "the name here is adapter.lora_target_modules",
    "lora_target_linear": "the name here is adapter.lora_target_modules (all-linear)",
    "lora_target_parameters": "adapters go into linear layers only; see adapter.lora_target_modules",
    "load_in_8bit": "weights are quantised to 4 bits or not at all; see adapter.load_in_4bit",
    "quantization_bit": "the name here is adapter.load_in_4bit",
}

FOREIGN_KEYS: dict[str, str] = {
    # ---- batch
    "per_device_train_batch_size": _BATCH,
    "per_device_eval_batch_size": "evaluation uses micro-batches of packing.max_tokens",
    "gradient_accumulation_steps": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "micro_train_batch_size": _BATCH,
    "batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "eval_batch_size": "evaluation uses micro-batches of packing.max_tokens",
    "auto_find_batch_size": _BATCH,
    "padding_free": _PACKING,
    "packing_length": "the name here is packing.max_tokens",
    "sample_packing": _PACKING,
    "eval_sample_packing": _PACKING,
    "pad_to_sequence_len": _PACKING,
    "pad_to_multiple_of": _PACKING,
    "pad_token": _PACKING,
    "padding_value": _PACKING,
    "label_pad_token_id": _PACKING,
    "group_by_length": _PACKING,
    "length_column_name": _PACKING,
    "train_sampling_strategy": "the name here is train.shuffle",
    "dataloader_drop_last": "the last step of an epoch is shorter; nothing is dropped",
    # ---- lengths
    "max_prompt_length": _PROMPT,
    "max_completion_length": _PROMPT,
    "max_target_length": _PROMPT,
    "prompt_max_len": _PROMPT,
    "generate_max_len": _PROMPT,
    "sequence_len": _LENGTH,
    "max_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "cutoff_len": _LENGTH,
    # ---- loss
    "pref_beta": _TEMPERATURE,
    "rl_beta": _TEMPERATURE,
    "dpo_beta": _TEMPERATURE,
    "reference_policy_kl_penalty": _TEMPERATURE,
    "kl_coef": _TEMPERATURE,
    "pref_loss": "the name here is loss.loss_type",
    "dpo_label_smoothing": "the name here is loss.label_smoothing",
    "rpo_alpha": _LIKELIHOOD,
    "pref_ftx": _LIKELIHOOD,
    "nll_loss_coef": _LIKELIHOOD,
    "router_aux_loss_coef": _WEIGHT,
    "aux_loss_coef": _WEIGHT,
    "use_logits_to_keep": _HEAD,
    "use_liger_loss": _HEAD,
    "enable_liger_kernel": "the name here is model.use_liger_kernel",
    "liger_fused_linear_cross_entropy": _HEAD,
    # ---- reference
    "ref_model": _REFERENCE,
    "ref_model_name_or_path": _REFERENCE,
    "ref_model_path": _REFERENCE,
    "reference_model": _REFERENCE,
    "reference_model_name_or_path": _REFERENCE,
    "reference_model_path": _REFERENCE,
    "ref_pretrain": _REFERENCE,
    "ref_model_init_kwargs": _REFERENCE,
    "force_use_ref_model": _REFERENCE,
    "reference_free": "the name here is reference.source: none",
    "precompute_ref_log_probs": _CACHE,
    "precompute_ref_batch_size": _CACHE,
    # ---- model
    **dict.fromkeys(("base_model", "pretrain", "model", "model_name", "model_path", "model_id"), _MODEL),
    **dict.fromkeys(("tokenizer", "tokenizer_config", "tokenizer_name", "tokenizer_path"), _TOKENIZER),
    "model_revision": "the name here is model.revision",
    "torch_dtype": _DTYPE,
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "tf32": _NONE,
    "param_dtype": _DTYPE,
    "precision": _DTYPE,
    "pure_bf16": _DTYPE,
    "flash_attention": "the name here is model.attn_implementation",
    "flash_attn": "the name here is model.attn_implementation",
    "sdp_attention": "the name here is model.attn_implementation",
    "gradient_checkpointing_kwargs": "only model.gradient_checkpointing: true or false",
    "activation_checkpointing": "the name here is model.gradient_checkpointing",
    "activation_offloading": "activations are recomputed by model.gradient_checkpointing, not offloaded",
    "model_init_kwargs": "options of the model stand in the section model",
    "disable_dropout": "dropout is always off",
    "torch_compile_mode": "only model.torch_compile: true or false",
    "chat_template_path": "the name here is data.chat_template",
    "template": "the tokenizer's chat template is used; change it in the tokenizer's folder",
    # ---- adapters and quantisation
    **_ADAPTER_KEYS,
    # ---- data
    **dict.fromkeys(("dataset_name", "datasets", "dataset", "dataset_mixture", "dataset_dir", "train_file"), _DATA),
    "dataset_config": _DATA,
    "dataset_train_split": "the name here is split, in an element of data.train",
    "dataset_test_split": "the name here is split, in an element of data.evaluation",
    "dataset_streaming": _WORKERS,
    "eval_dataset": "the name here is data.evaluation: a list of {path, split, limit}",
    "test_datasets": "the name here is data.evaluation: a list of {path, split, limit}",
    "val_size": "the name here is data.holdout",
    "val_set_size": "the name here is data.holdout",
    "test_split_size": "the name here is data.holdout",
    "max_samples": "the name here is limit, in an element of data.train",
    "dataset_num_proc": _WORKERS,
    "preprocessing_num_workers": _WORKERS,
    "dataloader_num_workers": _WORKERS,
    # ---- train
    "epochs": "the name here is train.num_train_epochs",
    "num_epochs": "the name here is train.num_train_epochs",
    "max_epochs": "the name here is train.num_train_epochs",
    "lr": "the name here is train.learning_rate",
    "lr_scheduler": "the name here is train.lr_scheduler_type",
    "lr_scheduler_kwargs": "train.lr_scheduler_type and train.warmup_steps are all there is",
    "warmup_ratio": "the name here is train.warmup_steps; a value between 0 and 1 is a share of all steps",
    "lr_warmup_ratio": "the name here is train.warmup_steps; a value between 0 and 1 is a share of all steps",
    "max_norm": "the name here is train.max_grad_norm",
    "gradient_clipping": "the name here is train.max_grad_norm",
    **dict.fromkeys(("beta1", "beta2"), "the names here are train.adam_beta1 and train.adam_beta2"),
    "adam_betas": "the names here are train.adam_beta1 and train.adam_beta2",
    "optim": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "data_seed": "train.seed alone fixes the order of the data",
    "full_determinism": _NONE,
    "max_train_steps": "the name here is train.max_steps",
    "save_path": "the name here is train.output_dir",
    # ---- parallel
    "deepspeed_config": "the name here is parallel.deepspeed",
    "zero_stage": "the name here is parallel.deepspeed, e.g. zero3",
    "fsdp": _PARALLEL,
    "fsdp_config": _PARALLEL,
    "tensor_parallel_size": _PARALLEL,
    "context_parallel_size": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    # ---- checkpoints, evaluation, logging
    "resume_from_checkpoint": "the name here is checkpoint.resume: auto, never or the path of a checkpoint",
    "auto_resume_from_checkpoints": "the name here is checkpoint.resume: auto, never or the path of a checkpoint",
    "load_checkpoint": "the name here is checkpoint.resume: auto, never or the path of a checkpoint",
    "overwrite_output_dir": "a folder that is not empty is never overwritten; give a new train.output_dir",
    "save_strategy": "the name here is checkpoint.save_steps; 0 saves only at the end",
    "save_only_model": "a checkpoint always holds the whole state; the model alone is written to model/",
    "max_ckpt_num": "the name here is checkpoint.save_total_limit",
    "greater_is_better": "it follows from evaluation.metric_for_best_model; leave this out",
    "early_stopping": "the name here is evaluation.early_stopping_patience, with evaluation.metric_for_best_model",
    "eval_strategy": "the name here is evaluation.eval_steps; 0 is never",
    "evaluation_strategy": "the name here is evaluation.eval_steps; 0 is never",
    "generate_during_eval": _NONE,
    "logging_strategy": "the name here is log.logging_steps",
    "logging_first_step": "the first line is written after log.logging_steps updates",
    "do_train": "leave it out: `dpo-dist train` trains",
    "do_eval": "leave it out: data.evaluation and evaluation.eval_steps decide whether and when it evaluates",
    "logging_dir": "everything is written to train.output_dir",
    "run_name": "the run is named by train.output_dir",
    "use_wandb": "the name here is log.report_to: [wandb]",
    "wandb_project": "the name here is log.report_to: [wandb]; wandb's own variables name the project",
    "push_to_hub": "nothing is uploaded; the trained model is written to model/ in train.output_dir",
    "hub_model_id": "nothing is uploaded; the trained model is written to model/ in train.output_dir",
}

FOREIGN_SOURCE_KEYS: dict[str, str] = {
    **dict.fromkeys(("id", "dataset_name", "data_dir", "data_files", "file_name"), "the name here is path"),
    **dict.fromkeys(("type", "ds_type", "field", "formatting"), "columns are recognised; columns gives other names"),
    **dict.fromkeys(("weight", "probs", "prob"), "the name here is fraction: the share of its rows that is used"),
    **dict.fromkeys(("config", "subset", "config_name"), "the name here is name"),
}

# Names that mean something only in the section they stand in.
FOREIGN_WITHIN: dict[str, dict[str, str]] = {
    "model": {
        **dict.fromkeys(("name", "path", "name_or_path", "policy"), _MODEL),
        **dict.fromkeys(("reference", "ref", "reference_name", "reference_path"), _REFERENCE),
    },
    "adapter": {
        **dict.fromkeys(("type", "name", "kind", "adapter_type"), _ADAPTER),
        **dict.fromkeys(("path", "folder", "adapter_path"), _ADAPTER_FOLDER),
        "r": "the name here is adapter.lora_r",
        "rank": "the name here is adapter.lora_r",
        "alpha": "the name here is adapter.lora_alpha",
        "target_modules": "the name here is adapter.lora_target_modules",
        "modules_to_save": "the name here is adapter.lora_modules_to_save",
        "dropout": "dropout is always off",
    },
    "reference": dict.fromkeys(("model", "name", "path", "name_or_path", "model_name_or_path"), _REFERENCE),
    "data": dict.fromkeys(("path", "name", "split", "limit", "files"), _DATA),
}

# Words for what has another word here. What only comes near to something is not in it: it would be another run.
FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "model.dtype": {
        "bf16": "bfloat16",
        **dict.fromkeys(("fp16", "f16", "half"), "float16"),
        **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    },
    "model.attn_implementation": {
        **dict.fromkeys(("flash_attention_2", "flash_attention_3", "flash_attention", "fa2", "fa3"), "flash_attn"),
        "eager": "sdpa",
        "flex_attention": "auto",
    },
    "model.prefix_sharing": {"true": "on", "false": "off"},
    "loss.loss_type": {
        "dpo": "sigmoid",
        "cdpo": "sigmoid",
        "dpo_norm": "sigmoid_norm",
        "aot_pair": "aot",
        "nll": "sft",
    },
    "adapter.peft_type": {
        **dict.fromkeys(("qlora", "dora", "rslora"), "lora"),
        "prefix": "prefix_tuning",
        "prompt": "prompt_tuning",
        "ptuning": "p_tuning",
    },
    "reference.source": {
        **dict.fromkeys(("precompute", "precomputed", "cached"), "cache"),
        "online": "live",
        "in_step": "live",
        "adapters_off": "adapter_off",
        "off": "none",
    },
    "train.lr_scheduler_type": {
        "linear_with_warmup": "linear",
        "cosine_with_warmup": "cosine",
        "constant_warmup": "constant_with_warmup",
    },
}

# Of such a word: what has to be set beside it.
FOREIGN_ALSO: dict[str, str] = {
    "cdpo": "loss.label_smoothing above 0",
    "qlora": "adapter.load_in_4bit=true",
    "dora": "adapter.use_dora=true",
    "rslora": "adapter.use_rslora=true",
}
