"""Which parameters DeepSpeed gathers when, at the sizes of Llama 3 8B and 70B.

    python -m tests.gpu_contract.gathers_worker OUT.json CASE.json ...

Each case is an object: `name`, `model` (8B, 70B or small), `fake`, and `zero`, settings that replace those of the
shipped file. Activations are recomputed, as in the shipped configuration. The process group is torch's fake one, of 64
ranks; with `fake` the tensors are fake ones too, which have shapes and no memory. What is real is everything that
decides about a gather: our model and engine, the shipped file, DeepSpeed's hooks, trace, prefetcher and release. There
are fewer layers than in the models, for the pattern repeats. DeepSpeed writes its trace in the first micro-batch and
follows it from the second on; OUT gets, of the third, which module ran when, and which gather was started before it.
"""

import json
import os
import resource
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  gives collectives that accept fake tensors
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from dpo_dist.attention.interface import register
from dpo_dist.config import TrainConfig
from dpo_dist.config.deepspeed import load_deepspeed
from dpo_dist.distributed import Ranks
from dpo_dist.engine import TrainingEngine, adopt_process_group, engine_config
from dpo_dist.model import ScoringModel, sharded_loading
from tests.gpu_contract.world_worker import Collectives, accept_what_rank_0_says
from tests.parity.oracle import packed, random_example

WORLD_SIZE = 64
MICRO_BATCHES = 3
BYTES = 2  # of an element in bfloat16
# Vocabulary, hidden, intermediate, layers, heads, key/value heads. From the config.json of Llama 3 8B and 70B but for
# the layers, which would be 32 and 80. "small" has memory and is computed with.
SHAPES = {
    "8B": (128256, 4096, 14336, 8, 32, 8),
    "70B": (128256, 8192, 28672, 6, 64, 8),
    "small": (500, 64, 96, 5, 4, 2),
}


class Observer:
    """Notes, for one micro-batch, which module is run when and which gather is started before it."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}
        self.collectives = Collectives()
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.phase, self.uses, self.gathers = "forward", [], []
        self.collectives.begin("micro-batch")
        self.collectives.by_step["micro-batch"].clear()

    def attach(self, engine: TrainingEngine) -> None:
        """Listen to the engine: to each module's fetch of its parameters, and to each gather that it starts."""
        self.names = {p: name.removeprefix("model.") for name, p in engine.model.named_parameters()}
        modules = {module: name.removeprefix("model.") for name, module in engine.model.named_modules()}
        coordinator = engine.engine.optimizer.parameter_offload.get_param_coordinator()
        stock = coordinator.fetch_sub_module

        def fetch(module: Any, forward: bool) -> None:
            own = [self.names[p] for p in module.parameters(recurse=False)]
            self.uses.append({"phase": self.phase, "module": modules[module], "parameters": own})
            stock(module, forward)

        coordinator.fetch_sub_module = fetch
        for parameter in self.names:
            parameter.all_gather_coalesced = self._noting(parameter.all_gather_coalesced)

    def _noting(self, stock: Any) -> Any:
        def all_gather_coalesced(parameters: Any, **settings: Any) -> Any:
            calls = self.collectives.by_step["micro-batch"]
            before = len(calls)
            handle = stock(parameters, **settings)
            ((kind, elements, dtype),) = calls[before:]  # one message, whatever the number of parameters
            assert (kind, dtype) == ("_allgather_base_", "torch.bfloat16")
            self.gathers.append(
                {
                    "position": len(self.uses) - 1,
                    "phase": self.phase,
                    "parameters": [self.names[p] for p in sorted(parameters, key=lambda p: p.ds_id)],
                    "bytes": elements * BYTES,
                }
            )
            return handle

        return all_gather_coalesced


def build(case: dict[str, Any], ranks: Ranks) -> TrainingEngine:
    """The policy as a run makes it, but with weights that nobody filled."""
    vocabulary, hidden, intermediate, layers, heads, kv_heads = SHAPES[case["model"]]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )
    file = load_deepspeed("zero3_bf16")
    file["zero_optimization"] |= case["zero"]
    deepspeed = engine_config(file, torch.bfloat16, ranks.device, max_grad_norm=1.0)
    with sharded_loading(deepspeed), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register("sdpa"), dtype=torch.bfloat16)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return TrainingEngine(ScoringModel(model), deepspeed, TrainConfig(output_dir="unused"), ranks)


def observe(case: dict[str, Any]) -> dict[str, Any]:
    """Some micro-batches forward and backward; what was seen of the last one."""
    os.environ.update(RANK="0", WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    adopt_process_group()
    accept_what_rank_0_says()
    seen, batch = Observer(), packed([random_example(i, 5 + i, [4, 3 + i]) for i in range(2)], share=True)
    with ExitStack() as stack:
        if case["fake"]:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        engine = build(case, Ranks(0, WORLD_SIZE, 0, torch.device("cpu")))
        seen.attach(engine)
        stack.enter_context(seen.collectives)
        engine.engine.set_gradient_accumulation_boundary(False)
        for _ in range(MICRO_BATCHES):
            seen.begin()
            logps_M = engine.token_logps(batch)
            seen.phase = "backward"
            engine.backward(logps_M.sum())
    parameters: list[Any] = list(engine.model.parameters())
    return {
        "uses": seen.uses,
        "gathers": seen.gathers,
        "bytes": {seen.names[p]: p.ds_numel * BYTES for p in parameters},
        "persistent": [seen.names[p] for p in parameters if p.ds_persist],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Observe every case, each in a process that is forked when everything has been imported."""
    out, *cases = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29678")  # nothing listens there: a fake group has no peers
    results = {}
    for text in cases:
        case = json.loads(text)
        part = Path(out).with_suffix(".part")
        child = os.fork()
        if not child:
            try:
                part.write_text(json.dumps(observe(case)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"case {case} failed")
        results[case["name"]] = json.loads(part.read_text())
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
