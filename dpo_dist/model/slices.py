"""A model that is partitioned from birth (ZeRO stage 3), and filled by every rank with the slices it owns.

transformers lets the first rank read every file, and sends each parameter three times. Here a rank
reads its part of each tensor and nothing else: the files are read once by all ranks together, and no weight travels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed
import torch
from deepspeed.utils import groups
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from dpo_dist.distributed import raise_together
from dpo_dist.model.fit import find_fit
from dpo_dist.pretrained.folder import weight_files

# By the run's process group and the size: what was made once. It is forgotten with the process group itself.
_NODE_GROUPS: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()


@contextmanager
def node_groups(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Inside, a model is loaded, or an engine made, whose configuration asks for hpZ; collective the first time.

    DeepSpeed keeps these groups in a global variable: it refuses to make them a second time, and uses them for every
    model that is not partitioned yet, whether its configuration asks for them or not. Here they are made once for each
    size, and DeepSpeed knows of them only while it builds what is to have them.
    """
    size = deepspeed_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size <= 1:
        yield
        return
    made = _NODE_GROUPS.setdefault(torch.distributed.group.WORLD, {})
    make, before = groups._create_zero_param_parallel_group, groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = made.get(size)
    try:
        if size not in made:
            make(size)
            made[size] = groups._get_zero_param_intra_parallel_group()
        groups._create_zero_param_parallel_group = lambda group_size: None
        yield
    finally:
        groups._create_zero_param_parallel_group, groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = make, before


def can_read_slices(
    folder: Path, config: PretrainedConfig, deepspeed_config: dict[str, Any], trust_remote_code: bool
) -> bool:
    """Whether every tensor of the model stands in the files under its own name, as it is computed with.

    Not so where files keep experts apart that are computed with as one, lack a prefix, or hold a tied weight twice:
    transformers knows these cases.
    """
    if _holds_more_than_a_slice(deepspeed_config["zero_optimization"]):
        return False
    if getattr(config, "quantization_config", None) is not None:
        return False
    return find_fit(folder, config, trust_remote_code).is_exact


def read_slices(
    folder: Path,
    config: PretrainedConfig,
    attention: str,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any],
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Build the model partitioned, and fill it. Collective.

    Args:
        folder: what `can_read_slices` was asked about.
        config, attention, dtype, deepspeed_config, trust_remote_code: as in `load_model`.
    """
    # The order matters: DeepSpeed's context must find `torch.arange` as transformers wants it.
    with no_init_weights(), prevent_arange_dtype_change(), _EmptyPartitions(config_dict_or_path=deepspeed_config):
        model: Any = AutoModelForCausalLM.from_config(
            deepcopy(config), attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    error = None
    try:
        _fill(model, folder)
    except Exception as failure:  # raised on every rank below
        error = failure
    raise_together(error)
    return model


class _EmptyPartitions(deepspeed.zero.Init):
    """DeepSpeed's partitioned construction, without sending every parameter's value from the first rank to the others.

    There are no values yet, and what nobody writes to takes no memory. Were the method below renamed, loading would
    only be slower again; a test counts what is sent.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()
        # What hpZ keeps beside the slice has no values either. DeepSpeed makes it again when it has gathered them.
        param.ds_secondary_tensor = None


@torch.no_grad()
def _fill(model: PreTrainedModel, folder: Path) -> None:
    wanted = model.state_dict(keep_vars=True)
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (tensor := wanted.get(name)) is None:
                    continue
                if not hasattr(tensor, "ds_tensor"):
                    tensor.copy_(file.get_tensor(name))
                    continue
                own = tensor.ds_tensor
                begin = own.numel() * tensor.ds_zero_partition_rank
                values = elements(file, name, begin, min(begin + own.numel(), tensor.ds_numel))
                own[: values.numel()].copy_(values)


def elements(file: Any, name: str, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of the flattened tensor, from as few rows as hold them."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if begin >= end:
        return torch.empty(0)
    if not shape:  # a single number
        return file.get_tensor(name).reshape(1)
    row = torch.Size(shape[1:]).numel()
    first = begin // row
    return stored[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


def _holds_more_than_a_slice(zero: dict[str, Any]) -> bool:
    """Or something else: compressed weights, a file."""
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    return on_disk or zero.get("zero_quantized_nontrainable_weights", False)
