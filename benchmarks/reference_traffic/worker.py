"""One rank trains some steps, and counts what the collectives of the last one move.

torchrun --nproc_per_node 2 -m benchmarks.reference_traffic.worker FOLDER G,G,... large|defaults

Over gloo a gather is a broadcast of each rank's part, and a reduce-scatter a reduction of each
(`dpo_dist/engine/gloo.py`): both count with all ranks' parts together. N is the number of the model's parameters, which
two ranks divide without a remainder. What else travels in a step are sums of a few numbers. `large` sets DeepSpeed's
limits as they act on a model that is large: nothing is kept from one use of a weight to the next.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_dist import losses
from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.cli.ending import end_rank
from dpo_dist.config import LossConfig, TrainConfig, load_deepspeed
from dpo_dist.data import Pair
from dpo_dist.distributed import Ranks, process_group
from dpo_dist.engine import (
    InferenceEngine,
    TrainingEngine,
    adopt_process_group,
    engine_config,
    inference_config,
    release_process_group,
)
from dpo_dist.model import load_model
from dpo_dist.packing import ExampleSize, Packer, StepPlan
from dpo_dist.pretrained import load_config
from dpo_dist.reference import LiveReference, Reference
from dpo_dist.tokenization import TokenizedExample

STEPS = 3  # DeepSpeed writes its trace in the first two, and follows it in the last
PROMPT, COMPLETIONS = 8, (5, 4)
TOKENS = PROMPT + sum(COMPLETIONS) - len(COMPLETIONS)  # of an example whose prompt is shared
LARGE = {
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
COUNTED = {"broadcast_": "gathered", "reduce_": "reduced"}


class Moved(TorchDispatchMode):
    """Elements by kind; whole buffers, not a rank's part."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = dict.fromkeys(COUNTED.values(), 0)

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        if operator.namespace == "c10d" and operator._opname not in ("allreduce_", "allgather_"):
            tensors = [leaf for leaf in tree_leaves((arguments, settings)) if isinstance(leaf, Tensor)]
            self.elements[COUNTED[operator._opname]] += max(tensor.numel() for tensor in tensors)
        return operator(*arguments, **(settings or {}))


@dataclass(frozen=True)
class Constant:
    """Stands in for a reference whose answers are stored."""

    device: torch.device

    def completion_logps(self, work: RankWork) -> Tensor:
        """See `Reference`."""
        return torch.full((work.num_completions,), -10.0, device=self.device)


def make_model(folder: Path) -> None:
    """Embeddings that are not tied: a weight that is used twice would be gathered twice."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def engines(folder: Path, ranks: Ranks, limits: dict[str, int]) -> tuple[TrainingEngine, InferenceEngine]:
    """As a run makes them, from the shipped file."""
    file = load_deepspeed("zero3_cpu")
    file["zero_optimization"] |= limits
    policy = engine_config(file, torch.float32, ranks.device, max_grad_norm=1.0)
    reference, name = inference_config(policy), register("sdpa")
    config = load_config(folder, False)
    own = load_model(folder, config, name, torch.float32, reference, False, trust_remote_code=False)
    answering = InferenceEngine(own, reference)
    trained = load_model(folder, config, name, torch.float32, policy, False, trust_remote_code=False)
    return TrainingEngine(trained, policy, TrainConfig(output_dir="unused"), ranks), answering


def work_of(ranks: Ranks, micro_batches: int) -> tuple[StepPlan, RankWork]:
    """One example in each micro-batch, all of them in one bin of the reference."""
    generator = torch.Generator().manual_seed(micro_batches)
    examples = []
    for index in range(ranks.world_size * micro_batches):
        ids = [torch.randint(1, 512, (n,), generator=generator).tolist() for n in (PROMPT, *COMPLETIONS)]
        completions = tuple(tuple(own) for own in ids[1:])
        examples.append(TokenizedExample(tuple(ids[0]), completions, (Pair(0, 1),), f"random:{index}"))
    sizes = [ExampleSize(PROMPT, COMPLETIONS, example.pairs) for example in examples]
    packer = Packer(ranks.world_size, TOKENS, TOKENS * micro_batches, share_prompts=True)
    plan = packer.plan(0, range(len(examples)), sizes)
    return plan, RankWork(plan, ranks.rank, examples, share_prompts=True)


def one_step(policy: TrainingEngine, reference: Reference, plan: StepPlan, work: RankWork) -> None:
    """What `trainer.train` does in one step."""
    loss = losses.bind(LossConfig())
    reference_logps = reference.completion_logps(work)
    for batch in policy.accumulate(work.micro_batches()):
        logps = policy.completion_logps(batch)
        sums = loss(batch, logps, logps - reference_logps[batch.completion_index_C])
        policy.backward(losses.mean_loss(sums, plan.weights))
    policy.step(1e-4)


def measure(folder: Path, counts: list[int], limits: dict[str, int]) -> None:
    """Every setting and number of micro-batches; the first rank writes what it counted, in N."""
    with process_group(release=release_process_group) as ranks:
        adopt_process_group()
        if ranks.is_first:
            make_model(folder / "model")
        torch.distributed.barrier()
        policy, engine = engines(folder / "model", ranks, limits)
        parameters: list[Any] = list(policy.model.parameters())
        whole = sum(parameter.ds_numel for parameter in parameters)
        references: dict[str, Reference] = {
            "per micro-batch": LiveReference(engine, per_microbatch=True),
            "once for a step": LiveReference(engine),
            "cached": Constant(ranks.device),
        }
        found: dict[str, dict[str, list[float]]] = {}
        for setting, reference in references.items():
            for count in counts:
                plan, work = work_of(ranks, count)
                assert len(work.micro_batches()) == count and len(work.reference_bins()) == 1
                for _ in range(STEPS - 1):
                    one_step(policy, reference, plan, work)
                with Moved() as moved:
                    one_step(policy, reference, plan, work)
                found.setdefault(setting, {})[str(count)] = [n / whole for n in moved.elements.values()]
        if ranks.is_first:
            (folder / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), list(map(int, sys.argv[2].split(","))), LARGE if sys.argv[3] == "large" else {})
    end_rank(0)
