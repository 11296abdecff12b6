"""What shard files hold, read offline: any range of any parameter, whoever saved it. No engine, no process group.

Layouts, DeepSpeed 0.19, one model-parallel rank:

| kind | stages | parameters and AdamW's two states are in |
|---|---|---|
| whole | 0 | `mp_rank_00_model_states.pt`, each parameter by itself; every rank has all of them |
| slices | 1, 2 | `*zero_pp_rank_R_mp_rank_00_optim_states.pt`: all parameters in a row, a part of it for each rank |
| parts | 3 | the same files: the R-th of equal parts of each parameter, padded |

In bfloat16 the names of optimizer files begin with `bf16_`. Where an adapter is trained, its
parameters alone are written: the frozen ones are in the base model's folder.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_dist.checkpoint.pickles import load_restricted
from dpo_dist.errors import CheckpointError

SHARDS_FOLDER = "shards"
# The engine trains a module that holds the language model as its attribute `model`.
WRAPPER_PREFIX = "model."
# Virtual tokens stand beside the language model.
VIRTUAL_PREFIX = "prompt_encoder."
_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_AS_SAVED = "resume with the ZeRO stage and the number of processes that it was saved with"
_WAY_OUT = "use another checkpoint"
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
_SCALER_VALUES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Layout:
    """How parameters are shared out among files, or among ranks that train."""

    kind: Literal["whole", "slices", "parts"]
    processes: int  # 1 where every process has everything
    prefix: str = field(default="", compare=False)  # of the optimizer files' names

    @property
    def stages(self) -> str:
        """The ZeRO stages of that kind, in words."""
        return {"whole": "0", "parts": "3"}.get(self.kind, "1 or 2")


def layout_of(checkpoint: Path) -> Layout | None:
    """How a checkpoint's parameters are shared out, by the names of its files; None if it holds no complete set."""
    folder = checkpoint / SHARDS_FOLDER
    if not folder.is_dir():
        return None
    matches = [match for path in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))]
    if not matches:
        return Layout("whole", 1) if (folder / _WHOLE_MODEL).is_file() else None
    if sorted(int(match[2]) for match in matches) != list(range(len(matches))):
        return None
    return Layout("slices" if (folder / _WHOLE_MODEL).is_file() else "parts", len(matches), matches[0][1] or "")


def layout_at(stage: int, world_size: int) -> Layout:
    """How so many processes share out what they train at a ZeRO stage."""
    return Layout("parts" if stage == 3 else "slices", world_size) if stage else Layout("whole", 1)


@dataclass(frozen=True)
class _Slice:
    """Consecutive elements of a parameter, and where they are."""

    begin: int  # in the parameter, flat
    length: int
    rank: int  # whose file
    group: int  # which of its flat tensors
    offset: int  # in that


class SavedStates:
    """Parameters, AdamW's states and counters of a checkpoint, in float32 or as they were saved.

    Files are memory-mapped: what is not asked for is not read.

    Args:
        checkpoint: A verified one.
        order: Names of the trained parameters as the optimizer has them in its groups. Stage 0 tells them by their
            number only; not needed to read values alone.
    Raises:
        CheckpointError: the shards are incomplete or their layout is unknown.
    """

    def __init__(self, checkpoint: Path, order: Sequence[str] = ()) -> None:
        layout = layout_of(checkpoint)
        first = "zero_pp_rank_0_" if layout is not None and layout.kind == "parts" else ""
        model = checkpoint / SHARDS_FOLDER / f"{first}{_WHOLE_MODEL}"
        if layout is None or not model.is_file():
            raise CheckpointError(f"{checkpoint} holds no complete set of shards; {_WAY_OUT}")
        self.layout = layout
        self._folder = checkpoint / SHARDS_FOLDER
        self._optimizers = functools.cache(self._read_optimizer)
        self.model: dict[str, Any] = load_restricted(model, mmap=True)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, list[_Slice]] = {}
        place = {"whole": self._place_whole, "parts": self._place_parts}.get(layout.kind, self._place_slices)
        place(order)

    def values(self, name: str) -> Tensor:
        """A whole parameter, flat."""
        return self.read(name, "value", 0, torch.Size(self.shapes[name]).numel())

    def read(self, name: str, key: str, begin: int, length: int) -> Tensor:
        """Elements `begin` to `begin + length` of a parameter or of a state of its.

        Args:
            name: of the parameter, as the engine's module has it.
            key: `value`, `exp_avg` or `exp_avg_sq`.
            begin: in the flat parameter.
            length: how many; shape of what is returned.
        Raises:
            CheckpointError: they are not in the shards.
        """
        pieces = []
        for one in self._slices[name]:
            low, high = max(begin, one.begin), min(begin + length, one.begin + one.length)
            if low < high:
                flat = self._flat(one.rank, one.group, key)
                pieces.append(flat[one.offset + low - one.begin : one.offset + high - one.begin])
        if (found := sum(len(piece) for piece in pieces)) != length:
            raise CheckpointError(f"{self._folder} holds {found} of {length} elements of {key} of {name}; {_WAY_OUT}")
        # Of a parameter with fewer elements than there are ranks, some ranks hold none.
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [torch.empty(0)])

    def models(self) -> list[dict[str, Any]]:
        """What each rank of stage 3 has beside the optimizer.

        Raises:
            CheckpointError: a file is missing.
        """
        paths = [self._folder / f"zero_pp_rank_{rank}_{_WHOLE_MODEL}" for rank in range(self.layout.processes)]
        if missing := [path for path in paths if not path.is_file()]:
            raise CheckpointError(f"{missing[0]} is missing: the set of shards is not complete; {_WAY_OUT}")
        return [load_restricted(path, mmap=True) for path in paths]

    def step(self) -> float:
        """Updates that AdamW's states have seen.

        Raises:
            CheckpointError: there are no states, or parameters differ: their number is one for all of a rank elsewhere.
        """
        steps = {float(state["step"]) for state in self._adam(0).values()}
        if len(steps) != 1:
            raise CheckpointError(f"{self._folder}: parameters have seen {sorted(steps) or 'no'} updates; {_AS_SAVED}")
        return steps.pop()

    def scaler(self) -> Mapping[str, float]:
        """Float16's loss scale and what it has seen; empty where another dtype was trained, whose scale is 1."""
        held = self._optimizers(0)
        scaler = held.get("loss_scaler")
        values = held if scaler is None else vars(scaler)
        found = {key: values[key] for key in _SCALER_VALUES if key in values}
        return found if "last_overflow_iter" in found else {}

    @property
    def is_halved(self) -> bool:
        """Stage 0: whether float32 values stand beside parameters of half precision."""
        return "fp32_groups" in self._optimizers(0)

    def alignment(self) -> list[list[int]] | None:
        """Stages 1 and 2: elements of filling after each parameter of each row; None: there are none."""
        found: list[list[int]] | None = self._optimizers(0).get("param_alignment_paddings")
        return found

    def _read_optimizer(self, rank: int) -> dict[str, Any]:
        if self.layout.kind == "whole":
            held: dict[str, Any] = self.model["optimizer"]
            return held
        path = self._folder / f"{self.layout.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content: dict[str, Any] = load_restricted(path, mmap=True)["optimizer_state_dict"]
        count = content.get("partition_count")
        count = count[0] if isinstance(count, list) else count  # stages 1 and 2: the same for each group
        if count != self.layout.processes:
            raise CheckpointError(f"{path} is one of {count} parts, and {self.layout.processes} are there; {_WAY_OUT}")
        return content

    def _adam(self, rank: int) -> dict[int, dict[str, Any]]:
        held = self._optimizers(rank)
        inner = held.get("base_optimizer_state", held.get("optimizer_state_dict", held))
        state: dict[int, dict[str, Any]] = inner["state"]
        return state

    def _flat(self, rank: int, group: int, key: str) -> Tensor:
        if key == "value":
            return self._flat_values(rank)[group].flatten()
        try:
            return self._adam(rank)[group][key].flatten()
        except KeyError:
            raise CheckpointError(f"{self._folder} holds no {key} of rank {rank}; {_AS_SAVED}") from None

    def _flat_values(self, rank: int) -> Sequence[Tensor]:
        held = self._optimizers(rank)
        if self.layout.kind == "whole":
            masters = held.get("fp32_groups")
            if masters is not None:
                return [master for group in masters for master in group]
            return [self.model["module"][name] for name in self._slices]
        flats = held.get("fp32_flat_groups" if self.layout.kind == "parts" else "single_partition_of_fp32_groups")
        # A rank of stage 1 or 2 may have nothing of a short row; what a rank of stage 3 has may be on NVMe.
        if not flats or (self.layout.kind == "parts" and not all(len(flat) for flat in flats)):
            raise CheckpointError(
                f"{self._folder} does not hold rank {rank}'s part of the float32 parameters; resume with the "
                "parallel.deepspeed that it was saved with, or export the model from a run without NVMe offload"
            )
        return flats

    def _place_whole(self, order: Sequence[str]) -> None:
        self.shapes = {name: tuple(self.model["module"][name].shape) for name in order if name in self.model["module"]}
        lengths = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        self._slices = {name: [_Slice(0, lengths[name], 0, number, 0)] for number, name in enumerate(self.shapes)}
        if not order:
            return
        held = self._optimizers(0)
        groups = held.get("optimizer_state_dict", held)["param_groups"]
        if (count := sum(len(group["params"]) for group in groups)) != len(order) or len(self.shapes) != len(order):
            raise CheckpointError(
                f"{self._folder} holds {len(self.shapes)} of the {len(order)} parameters that are trained, and states "
                f"of {count}"
            )

    def _place_slices(self, order: Sequence[str]) -> None:
        self._take_shapes()
        # The order of the row: `param_slice_mappings` are wrong in files of round_robin_gradients (0.19.8).
        paddings = self.alignment()
        for group, shapes in enumerate(self.model["param_shapes"]):
            size, begin = len(self._flat_values(0)[group]), 0  # every rank's part; the first may hold the whole row
            for number, (name, shape) in enumerate(shapes.items()):
                self._slices[name] = list(self._cut(begin, shape.numel(), size, group))
                begin += shape.numel() + (paddings[group][number] if paddings else 0)

    def _cut(self, begin: int, length: int, size: int, group: int) -> Iterator[_Slice]:
        """Who holds `length` elements from `begin` on of a row that is cut into parts of `size`."""
        for rank in range(begin // size, self.layout.processes):
            low, high = max(begin, rank * size), min(begin + length, (rank + 1) * size)
            if low >= high:
                break
            yield _Slice(low - begin, high - low, rank, group, low - rank * size)

    def _place_parts(self, order: Sequence[str]) -> None:
        self._take_shapes()
        for group, shapes in enumerate(self.model["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                length = -(-shape.numel() // self.layout.processes)
                self._slices[name] = [
                    _Slice(rank * length, max(0, min(length, shape.numel() - rank * length)), rank, group, offset)
                    for rank in range(self.layout.processes)
                ]
                offset += length
            if (held := len(self._flat_values(0)[group])) != offset:
                raise CheckpointError(
                    f"{self._folder}: parameters need {offset} values of each rank, the shards hold {held}"
                )

    def _take_shapes(self) -> None:
        groups = self.model["param_shapes"]
        self.shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}


def full_parameters(checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and full value of each parameter and persistent buffer, one at a time, on the CPU.

    Files are memory-mapped: the process holds one parameter, not the model.

    Args:
        checkpoint: A verified checkpoint.
        dtype: What the model computes with; the float32 parameters of stage 3 are rounded to it, as the optimizer did.
    Raises:
        CheckpointError: if a shard is missing or its layout is unknown.
    """
    states = SavedStates(checkpoint)
    tensors = _from_parts(states, dtype) if states.layout.kind == "parts" else states.model["module"].items()
    for name, tensor in tensors:
        if not name.startswith((WRAPPER_PREFIX, VIRTUAL_PREFIX)):
            raise CheckpointError(f"{checkpoint}: parameter {name} does not begin with {WRAPPER_PREFIX!r}")
        yield name.removeprefix(WRAPPER_PREFIX), tensor


def _from_parts(states: SavedStates, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    first = states.model
    for name in first["buffer_names"]:
        yield name, first["module"][name]
    # Frozen parameters have no optimizer state: each rank keeps its part beside the model.
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in states.models()]
        yield name, torch.cat(parts)[: shape.numel()].view(shape)
    for name, shape in states.shapes.items():
        yield name, states.values(name).view(shape).to(dtype)
