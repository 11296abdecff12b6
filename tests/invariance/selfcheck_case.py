"""Two real engines on a small random model, and a step for them to be proved on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.config import load_config, load_deepspeed
from dpo_dist.distributed import Ranks
from dpo_dist.engine import InferenceEngine, TrainingEngine, engine_config, inference_config
from dpo_dist.model import load_model
from dpo_dist.packing import ExampleSize, Packer, StepPlan
from dpo_dist.reference import LiveReference
from dpo_dist.selfcheck import Proof, prove
from dpo_dist.tokenization import TokenizedExample
from tests.golden.trajectories import FOLDER
from tests.parity.oracle import VOCABULARY, random_example


def save_model(folder: Path, initializer_range: float = 0.25) -> Path:
    """Odd sizes, that neither DeepSpeed's partitions nor a kernel's blocks divide.

    Weights are large by default: as with a trained model, what a token sees changes what follows by whole nats.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=30,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


EXAMPLES = [
    random_example(1, prompt=30, completions=(20, 25)),
    random_example(2, prompt=12, completions=(40, 9, 17, 1)),
    random_example(3, prompt=1, completions=(5, 30)),
    random_example(4, prompt=50, completions=(33,)),
]


class Case:
    """Policy and reference of the same weights, unless told otherwise."""

    def __init__(
        self, folder: Path, stage: int, dtype: torch.dtype, ranks: Ranks, reference_dtype: torch.dtype | None = None
    ) -> None:
        self.ranks = ranks
        overrides = [f"model.model_name_or_path={folder}", "train.output_dir=unused"]
        overrides.append(f"data.train=[{{path: {FOLDER / 'pairs.jsonl'}}}]")
        config_file = folder / "run.yaml"
        config_file.write_text("{}")
        train = load_config(config_file, overrides).train
        deepspeed = engine_config(load_deepspeed(f"zero{stage}_cpu"), dtype, ranks.device, 1.0)
        self.policy = TrainingEngine(_load(folder, deepspeed, dtype), deepspeed, train, ranks)
        other = reference_dtype or dtype
        inference = inference_config(engine_config(load_deepspeed(f"zero{stage}_cpu"), other, ranks.device, 1.0))
        self.reference = LiveReference(InferenceEngine(_load(folder, inference, other), inference))

    def prove(
        self,
        examples: list[TokenizedExample] = EXAMPLES,
        share: bool = True,
        max_tokens: int = 400,
        work_type: type[RankWork] = RankWork,
        reference: LiveReference | None = None,
        same_weights: bool = True,
    ) -> Proof:
        """The proof of a step of these examples."""
        plan = plan_of(examples, self.ranks.world_size, share, max_tokens)
        work = work_type(plan, self.ranks.rank, examples, share)
        return prove(self.policy, reference or self.reference, work, plan, same_weights, 2 * max_tokens)


def plan_of(examples: list[TokenizedExample], world_size: int, share: bool, max_tokens: int) -> StepPlan:
    """As the trainer plans a step."""
    sizes = [ExampleSize(len(e.prompt_ids), tuple(map(len, e.completion_ids)), e.pairs) for e in examples]
    return Packer(world_size, max_tokens, 2 * max_tokens, share).plan(0, range(len(examples)), sizes)


def _load(folder: Path, deepspeed: dict[str, Any], dtype: torch.dtype) -> Any:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    return load_model(folder, config, register("sdpa"), dtype, deepspeed, True, False)


def nudge_one_matrix(engine: InferenceEngine) -> None:
    """Move every element of one matrix by one bfloat16 step."""
    matrix = engine.model.model.model.layers[1].mlp.up_proj.weight
    is_sharded = hasattr(matrix, "ds_id")
    with deepspeed.zero.GatheredParameters([matrix], modifier_rank=0, enabled=is_sharded), torch.no_grad():
        bits = matrix.data.to(torch.bfloat16).view(torch.int16) + 1
        matrix.data.copy_(bits.view(torch.bfloat16))


# ---- faults of a micro-batch's builder


def rejected_sees_chosen(batch: MicroBatch) -> MicroBatch:
    """The second completion's keys also hold the first one's tokens."""
    layout = batch.layout
    if layout.kv_index_U is None or len(layout.q_lengths) < 2:
        return batch
    first_q, (first_k, second_k) = layout.q_lengths[0], layout.k_lengths[:2]
    own_k = layout.q_lengths[1]
    prompt_k = second_k - own_k
    chosen = layout.kv_index_U[prompt_k:first_k] if prompt_k < first_q else layout.kv_index_U[:0]
    before, after = layout.kv_index_U[: first_k + prompt_k], layout.kv_index_U[first_k + prompt_k :]
    lengths = (first_k, second_k + len(chosen), *layout.k_lengths[2:])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wrong = replace(layout, cu_k=ends, k_lengths=lengths, kv_index_U=torch.cat([before, chosen, after]))
    return replace(batch, layout=wrong)


def positions_not_restarted(batch: MicroBatch) -> MicroBatch:
    """Positions run on from one completion to the next."""
    return replace(batch, position_ids_T=torch.arange(len(batch.position_ids_T)))


def score_index_shifted(batch: MicroBatch) -> MicroBatch:
    """Every token is scored from the position after the one that predicts it."""
    return replace(batch, score_index_M=(batch.score_index_M + 1).clamp(max=len(batch.input_ids_T) - 1))


def targets_shifted(batch: MicroBatch) -> MicroBatch:
    """Every token is scored as its neighbour."""
    return replace(batch, target_ids_M=batch.target_ids_M.roll(1))


def sequences_not_separated(batch: MicroBatch) -> MicroBatch:
    """One causal sequence from the first packed token to the last."""
    length = (len(batch.input_ids_T),)
    ends = torch.tensor([0, *length], dtype=torch.int32)
    wrong = replace(batch.layout, cu_q=ends, cu_k=ends, kv_index_U=None, q_lengths=length, k_lengths=length)
    return replace(batch, layout=wrong)


class ShuffledReference(LiveReference):
    """Gives every completion the log-probability of another one."""

    def completion_logps(self, work: RankWork) -> Tensor:
        return super().completion_logps(work).roll(1)


def builds_wrongly(fault: Any, only_shared: bool = False) -> type[RankWork]:
    """A rank's work whose micro-batches have a fault."""

    class Faulty(RankWork):
        def build(self, positions: Any, share_prompts: bool, limit: int | None = None) -> MicroBatch:
            batch = super().build(positions, share_prompts, limit)
            return fault(batch) if positions and (share_prompts or not only_shared) else batch

    return Faulty
