"""What the comparison with the architecture's own forward needs at the size of an 8B model, on the meta device."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.model import ScoringModel
from dpo_dist.selfcheck.own_forward import compare_with_own_forward
from tests.gpu_contract.shapes import LLAMA_8B
from tests.invariance.selfcheck_case import plan_of
from tests.parity.oracle import random_example

META = torch.device("meta")
EXAMPLES = [random_example(i, 4000 + 10 * i, [3000 + 7 * i, 2500 - 9 * i]) for i in range(3)]


class Memory(TorchDispatchMode):
    """Bytes of what is computed and still held, weights apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._held: dict[int, list[int]] = {}  # by storage: bytes, and how many tensors show it
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        if operator is torch.ops.aten._local_scalar_dense.default:
            return True  # transformers asks whether positions are those of one sequence
        result = operator(*arguments, **(settings or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._weights:
                size, shown = self._held.get(key, [tensor.untyped_storage().nbytes(), 0])
                self.now += 0 if shown else size
                self._held[key] = [size, shown + 1]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._release, key)
        return result

    def _release(self, key: int) -> None:
        size, shown = self._held.pop(key)
        if shown > 1:
            self._held[key] = [size, shown - 1]
        else:
            self.now -= size


class Engine:
    """As an engine asks the model, without DeepSpeed; numbers are made up where they leave the device."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        with META:
            model: Any = AutoModelForCausalLM.from_config(
                LLAMA_8B, attn_implementation=register("sdpa"), dtype=self.dtype
            )
        self.model = ScoringModel(model.train().requires_grad_(False))
        self.peaks: list[int] = []

    def _ask(self, batch: Any, **how: bool) -> Tensor:
        with Memory(self.model) as memory:
            answer = self.model(batch.to(META), **how)
        self.peaks.append(memory.peak)
        return torch.zeros(answer.shape)

    def token_logps(self, batch: Any) -> Tensor:
        return self._ask(batch)

    def own_token_logps(self, batch: Any) -> Tensor:
        return self._ask(batch, by_itself=True)


def test_it_takes_less_than_two_layers() -> None:
    engine = Engine()
    plan = plan_of(EXAMPLES, 1, True, 40_000)
    work = RankWork(plan, 0, EXAMPLES, True)
    compare_with_own_forward(engine, work, plan.micro_batches[0][0])
    layer = sum(p.numel() * p.element_size() for p in engine.model.model.model.layers[0].parameters())
    assert len(engine.peaks) == 3 and min(engine.peaks) > 10 * 2**20
    assert max(engine.peaks) < 2 * layer
    whole = len(EXAMPLES[0].prompt_ids) * LLAMA_8B.vocab_size * 4
    assert max(engine.peaks) < whole / 10, "the whole example's logits would be this large"
