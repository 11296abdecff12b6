"""The sections of a run's configuration: every option with its meaning, unit and effect.

What they have in common stands in `section.py`; adapters, data, evaluation, loss and reference have files of their own.
"""

from typing import Annotated, Literal

from pydantic import Field

from dpo_dist.config.adapter import AdapterConfig
from dpo_dist.config.data import DataConfig, Rated
from dpo_dist.config.evaluation import EvaluationConfig, HealthConfig
from dpo_dist.config.loss import LossConfig
from dpo_dist.config.reference import ReferenceConfig
from dpo_dist.config.section import Flag, Number, Section, Text


class ModelConfig(Section):
    """Which weights are trained, which ones they are compared with, and how the forward pass is computed."""

    model_name_or_path: Text
    """The policy: a local folder with safetensors weights, a hub id, or `demo` (SmolLM2-135M-Instruct from a Python
    package)."""
    reference_name_or_path: Text | None = None
    """The frozen reference: folder, hub id or `demo`. null: the weights the policy starts from."""
    tokenizer_name_or_path: Text | None = None
    """Folder or hub id of the tokenizer. null: the one of model_name_or_path."""
    revision: Text | None = None
    """Branch, tag or commit of the hub repository model_name_or_path, not of any other. null: its main branch."""
    trust_remote_code: Flag = False
    """Run Python code that comes with the model. Needs a commit hash in `revision`, or local folders."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Number format of the forward and backward pass. Master weights, optimizer state and log-softmax are float32
    always; float16 scales the loss and needs a GPU."""
    attn_implementation: Literal["auto", "sdpa", "torch", "flash_attn"] = "auto"
    """Attention kernel. `flash_attn`: the flash-attn package; `torch`: PyTorch's variable-length kernel, with
    flash-attn 3 or 4 activated in it where one is installed and fits; `sdpa`: one call for each completion, runs
    everywhere; `auto`: the first of these that this machine and dtype have."""
    deterministic: Literal["auto"] | Flag = "auto"
    """Whether gradients are the same bits when a run is repeated on the same GPUs. `auto`: flash-attn's backward is
    asked to be, and a package that cannot is passed over; `true`: all of torch is, where it can, and warns where it
    cannot; `false`: nothing is asked to be, which should be faster: not measured here. On a CPU they are the same in
    any case."""
    use_liger_kernel: Flag = False
    """Compute RMSNorm, SwiGLU and RoPE by the fused kernels of the package liger-kernel, which are made to save memory
    and time: not measured here. The same result within rounding. Needs a GPU with Triton. The output head is computed
    as ever, in chunks."""
    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    """Compute every prompt once for all its completions. `auto`: where the architecture is known to allow it; `on`: an
    error where it is not; `off`: each completion carries its own copy of the prompt (same result, more tokens)."""
    gradient_checkpointing: Literal["auto"] | Flag = "auto"
    """Recompute activations in the backward pass: less memory, up to a third more compute, the same result. `true`: in
    every layer; `false`: in none; `auto`: in as few layers as this device has memory for, measured at the start."""

    torch_compile: Flag = False
    """Compile the decoder's layers and the output head with torch.compile, once for all lengths: the first step takes
    as much longer as is logged, the others some 3 % less on a CPU; not measured on a GPU. Same result within rounding.
    Not with 4 bits or virtual tokens, nor with adapters under ZeRO-3."""


class TrainConfig(Section):
    """How far, how fast, and where to."""

    output_dir: Text
    """The run's folder: configuration, metrics, checkpoints and the trained model. Relative to the current folder.
    Must be empty or absent unless the run is resumed."""
    examples_per_step: Annotated[int, Field(ge=1)] = 32
    """Examples (a prompt with its completions) for each update of the weights, over all ranks together. How they are
    split over ranks and micro-batches never changes the result."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Updates of the weights. null: as many as num_train_epochs needs."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 1.0
    """Passes over the training data, if max_steps is null."""
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning rate after the warmup: falls to 0 in a straight line or a half cosine, or stays."""
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.0
    """Updates in which the learning rate rises from 0 to its peak. Between 0 and 1: a share of all updates."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW, per update and unit of learning rate; not applied to biases and norms."""
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    """Gradients whose global norm is larger are scaled down to it."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to the denominator of AdamW's update."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the order of examples; together with the step number it fixes every step's examples."""
    shuffle: Flag = True
    """Draw a new order of the examples in each epoch. false: the order of the files."""
    self_check: Flag = True
    """Before the first update, prove that policy and reference agree where they must, and measure rounding noise."""


class PackingConfig(Section):
    """How many tokens are computed at once. Changes speed and memory, never the result beyond rounding."""

    max_tokens: Annotated[int, Field(ge=1)] = 8192
    """Tokens in a micro-batch of the policy on one rank, prompts counted once if they are shared. The longest
    example must fit."""
    reference_max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in a micro-batch of the reference, which keeps no activations. null: twice max_tokens."""


class ParallelConfig(Section):
    """How the model is spread over processes."""

    deepspeed: Text = "zero3_bf16"
    """A file in `deepspeed_configs/` by its name without .json, or the path of a .json file."""
    ddp_timeout: Annotated[int, Field(ge=1)] = 1800
    """The run ends if nothing moves for so many seconds: a rank hangs or is gone. Set it above the longest micro-batch,
    save or restore."""


class CheckpointConfig(Section):
    """When the run's state is saved, and what it starts from."""

    save_steps: Annotated[int, Field(ge=0)] = 500
    """Save every this many updates, and at the end. 0: only at the end."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = None
    """Keep this many of the newest checkpoints. null: all."""
    async_save: Flag = False
    """Copy what is to be saved to host memory, and write it while training goes on: a step loses the time of the copy,
    not of the write. Takes host memory for each rank's share of weights and optimizer, and a processor core that is
    free. Not for AdaLoRA, and not for the last checkpoint, which is waited for."""
    resume: Text = "never"
    """`never`: start new; `auto`: go on from the newest sound checkpoint of output_dir, if there is one; or the path
    of a checkpoint to go on from."""


class LogConfig(Section):
    """Where the run's numbers go; `metrics.jsonl` is always written."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Write one line of metrics, means over these updates, every this many updates."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Trackers that get the same numbers. []: none."""
    profile_steps: list[Annotated[int, Field(ge=1)]] = []
    """Updates that the first rank records with torch's profiler: profile/step-000003.json.gz in the run's folder, for
    chrome://tracing or Perfetto. A recorded step is slower."""


class RunConfig(Section):
    """One training run of dpo_dist."""

    model: ModelConfig
    """Which weights are trained, which ones they are compared with, and how the forward pass is computed."""
    adapter: AdapterConfig = AdapterConfig()
    """Train a small addition to frozen weights (PEFT) instead of all weights."""
    data: DataConfig
    """What is trained on, and what happens to rows that do not fit or are faulty."""
    loss: LossConfig = LossConfig()
    """The objective."""
    reference: ReferenceConfig = ReferenceConfig()
    """Where the reference's log-probabilities come from."""
    train: TrainConfig
    """How far, how fast, and where to."""
    packing: PackingConfig = PackingConfig()
    """How many tokens are computed at once. Changes speed and memory, never the result beyond rounding."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over processes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved, and what it starts from."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the held-out data sets are evaluated, and what follows from it."""
    health: HealthConfig = HealthConfig()
    """What of a run's numbers is cause for concern, and what happens then."""
    log: LogConfig = LogConfig()
    """Where the run's numbers go; `metrics.jsonl` is always written."""

    @property
    def has_reference(self) -> bool:
        """Whether the policy is compared with anything.

        With `auto` not where no loss reads a reference, unless one was asked for: metrics tell how far the policy has
        moved from it.
        """
        if self.reference.source != "auto":
            return self.reference.source != "none"
        asked = self.reference != ReferenceConfig() or self.model.reference_name_or_path is not None
        return asked or self.loss.reads_a_reference

    @property
    def rated(self) -> Rated:
        """What becomes of completions that are called good or bad."""
        if not self.loss.rates_completions:
            return "paired"
        return "rest" if self.loss.compares else "all"

    @property
    def compares(self) -> bool:
        """Whether the data are compared in pairs: there are reward accuracies then."""
        return not self.trains_on_demonstrations and self.rated != "all"

    @property
    def trains_on_demonstrations(self) -> bool:
        """Whether this is a supervised run: chosen completions alone are read, and compared with nothing."""
        return self.loss.loss_types == ("sft",) and not self.has_reference
