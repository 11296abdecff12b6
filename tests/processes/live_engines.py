"""Policy and live reference on two small models, as a run builds them; what tests of the reference look at."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch
from dpo_dist.config import TrainConfig, load_deepspeed
from dpo_dist.distributed import Ranks
from dpo_dist.engine import InferenceEngine, TrainingEngine, engine_config, inference_config
from dpo_dist.model import ScoringModel, load_model, scoring
from dpo_dist.pretrained import DTYPES, load_config
from tests.parity.oracle import packed, random_example
from tests.tiny_engine import tiny_config

EXAMPLES = [random_example(i, 5 + i, [4, 3 + i]) for i in range(3)]
LEARNING_RATE = 0.05  # the policy moves by much more than a rounding error


@dataclass(frozen=True)
class Setting:
    """How the engines are made."""

    stage: int
    dtype: str = "float32"
    reference_dtype: str | None = None
    zero: dict[str, int] = field(default_factory=dict)  # replaces settings of the shipped file
    offload_param: bool = False
    hpz: int | None = None
    sharded: bool = True
    by_transformers: bool = False

    def policy_config(self, ranks: Ranks) -> dict[str, Any]:
        """The policy's DeepSpeed configuration."""
        file = load_deepspeed(f"zero{self.stage}_cpu")
        file["zero_optimization"] |= self.zero
        return engine_config(file, DTYPES[self.dtype], ranks.device, 1.0)

    def reference_config(self, ranks: Ranks) -> dict[str, Any]:
        """The reference's."""
        dtype = None if self.reference_dtype is None else DTYPES[self.reference_dtype]
        return inference_config(self.policy_config(ranks), dtype, self.sharded, self.offload_param, self.hpz, ranks)

    def policy(self, folder: Path, ranks: Ranks) -> TrainingEngine:
        """A new policy, of the first model."""
        config = self.policy_config(ranks)
        model = self._model(folder / "policy", DTYPES[self.dtype], config)
        return TrainingEngine(model, config, TrainConfig(output_dir="unused"), ranks)

    def reference(self, folder: Path, ranks: Ranks) -> InferenceEngine:
        """A new reference, of the second model."""
        config = self.reference_config(ranks)
        return InferenceEngine(
            self._model(folder / "reference", DTYPES[self.reference_dtype or self.dtype], config), config
        )

    def _model(self, folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> ScoringModel:
        stock, found = scoring.can_read_slices, []

        def can_read_slices(*arguments: Any) -> bool:
            found.append(stock(*arguments))
            return found[0] and not self.by_transformers

        with mock.patch.object(scoring, "can_read_slices", can_read_slices):
            model_config = load_config(folder, trust_remote_code=False)
            model = load_model(folder, model_config, register("sdpa"), dtype, config, False, trust_remote_code=False)
        assert found in ([], [True])
        return model


def save_models(folder: Path) -> None:
    """Two models with other weights; sizes that neither 2 nor 4 ranks divide, tied embeddings."""
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)


def batch_of(rank: int = 0) -> MicroBatch:
    """A micro-batch, another one on each rank."""
    return packed([EXAMPLES[rank % len(EXAMPLES)], EXAMPLES[-1]], share=True)


def train_step(policy: TrainingEngine, batch: MicroBatch) -> None:
    """One update."""
    for one in policy.accumulate([batch]):
        policy.backward(policy.completion_logps(one).sum() / 100)
    policy.step(LEARNING_RATE)


def whole(engine: TrainingEngine | InferenceEngine) -> dict[str, Tensor]:
    """All parameters and buffers on the first rank, nothing on the others. Every rank must call it."""
    found = {name: tensor for name, tensor in engine.named_full_parameters() if tensor is not None}
    return {name: tensor.clone() for name, tensor in found.items()} if torch.distributed.get_rank() == 0 else {}


def plain_model(parameters: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The same weights without DeepSpeed."""
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=register("sdpa"), dtype=dtype)
    model.load_state_dict(parameters, strict=False)
    return model


def live_bytes(at_rest: float = 0.5) -> int:
    """What all tensors of this process take together, every storage once, when it is at rest.

    A thread of gloo holds the tensors of a collective a moment longer than its caller waits: counted at once, they are
    now and then among what stays. So it counts until nothing was let go for `at_rest` seconds.
    """
    least, since = _live_bytes(), time.monotonic()
    while time.monotonic() - since < at_rest:
        time.sleep(at_rest / 10)
        if (now := _live_bytes()) < least:
            least, since = now, time.monotonic()
    return least


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu" and type(thing).__name__ != "FakeTensor":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Sent(TorchDispatchMode):
    """Largest number of elements of every collective of numbers with a point, and how many processes take part."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        if operator.namespace == "c10d":
            leaves = tree_leaves((arguments, settings))
            floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            largest = max((leaf.numel() for leaf in floats), default=0)
            objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
            (group,) = [one for one in objects if str(one._type()).endswith("c10d.ProcessGroup")]
            self.calls.append((operator._opname, largest, torch.distributed.ProcessGroup.unbox(group).size()))
        return operator(*arguments, **(settings or {}))

    def gathered(self, group_size: int) -> int:
        """Elements that groups of that size have gathered, by a broadcast of each rank's part; DeepSpeed also asks
        whether numbers are the same everywhere.
        """
        return sum(count for name, count, size in self.calls if name == "broadcast_" and size == group_size)
