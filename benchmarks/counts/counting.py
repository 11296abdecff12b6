"""Tokens, operations and bytes of layouts: sums over steps, for every system.

Operations are the packer's closed form (`dpo_dist/packing/cost.py`): matrix products alone, an addition and a
multiplication are two. What is computed again is counted again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.counts.layouts import (
    Layout,
    Setting,
    ours,
    packed,
    packed_all_logits,
    packed_by_branch,
    single_pairs,
    trl,
    trl_sorted,
)
from benchmarks.counts.shapes import Shape
from dpo_dist.packing import CostModel, ExampleSize, Packer

WEIGHT_BYTES = 2  # bfloat16, of every gather
OURS = "ours"


@dataclass(frozen=True)
class System:
    """A row of the table.

    Args:
        name: of the row.
        layout: of its steps, a key of `layouts_of`.
        asks_reference: it is computed in this epoch, whether for a step or into a cache; else it is read.
        gradient_bytes: of an element that is reduced.
    """

    name: str
    layout: str
    asks_reference: bool = True
    gradient_bytes: int = 2


# Gradients: DeepSpeed reduces in the model's dtype unless `communication_data_type` says otherwise
# (deepspeed/runtime/engine.py, communication_data_type); our shipped zero3_bf16 asks for float32. A cache that is
# filled in the first epoch is one more forward of the reference over all data, in the same bins as training has (ours:
# in the reference's): as much as a reference that is asked in every step.
SYSTEMS = (
    System("TRL", "trl"),
    System("TRL, sorted by length", "trl_sorted"),
    System("packed, all logits (OpenRLHF)", "packed_all_logits"),
    System("packed (ms-swift)", "packed"),
    System("packed, all logits, cached (open-instruct), epoch 1", "packed_by_branch"),
    System("the same, later epochs", "packed_by_branch", asks_reference=False),
    System(OURS, "ours", gradient_bytes=4),
    System("ours, cached, epoch 1", "ours", gradient_bytes=4),
    System("ours, cached, later epochs", "ours", asks_reference=False, gradient_bytes=4),
)


@dataclass(frozen=True)
class Work:
    """What one system does on average."""

    tokens: float  # through the body in the policy's forward, of a pair
    scored: float  # positions that the policy's head is applied to, of a pair
    operations: tuple[float, ...]  # of a pair, for every shape
    slots: float  # G: micro-batches of a rank in a step
    elements: float  # that a rank's collectives move in a step, in N
    traffic: tuple[float, ...]  # bytes of a rank in a step, for every shape


@dataclass(frozen=True)
class Model:
    """A shape with what it costs."""

    shape: Shape
    cost: CostModel

    @classmethod
    def of(cls, shape: Shape, recomputes: bool) -> "Model":
        """Recomputation is on or off in all systems alike."""
        return cls(shape, shape.cost(recomputes))


def layouts_of(sizes: Sequence[ExampleSize], setting: Setting, cost: CostModel) -> dict[str, Layout]:
    """One step's layout in every system.

    Args:
        sizes: of the step's examples.
        setting: ranks and token budgets.
        cost: that our packer evens out; does not change what is counted but through the number of slots.
    """
    packer = Packer(setting.ranks, setting.max_tokens, setting.reference_max_tokens, setting.share_prompts, cost)
    ways = [trl, trl_sorted, packed, packed_all_logits, packed_by_branch, partial(ours, packer=packer)]
    names = ["trl", "trl_sorted", "packed", "packed_all_logits", "packed_by_branch", "ours"]
    return {name: way(sizes, setting) for name, way in zip(names, ways, strict=True)}


def policy_operations(layout: Layout, cost: CostModel) -> float:
    """Forward, backward and recomputation, of all ranks."""
    matrices, attention, head = _split(cost)
    share = layout.share_prompts
    body = matrices.training(layout.rows, share).sum() + attention.training(layout.attended, share).sum()
    if layout.keeps_logits:
        return float(body + (1.0 + cost.backward) * head.forward(layout.scored, share).sum())
    return float(body + head.training(layout.scored, share).sum())


def reference_operations(layout: Layout, cost: CostModel) -> float:
    """A forward pass over the same tokens, of all ranks."""
    matrices, attention, head = _split(cost)
    share = layout.share_prompts
    parts = ((matrices, layout.rows), (attention, layout.attended), (head, layout.scored))
    return float(sum(own.forward(sizes, share).sum() for own, sizes in parts))


def moved_elements(slots: int, reference_slots: int) -> int:
    """N that a rank's collectives move in a step under ZeRO-3.

    Weights are gathered for the forward and for the backward of every micro-batch, gradients are reduced once in each;
    every forward of the reference gathers once. Measured by `benchmarks/reference_traffic`.
    """
    return 3 * slots + reference_slots


def moved_bytes(parameters: int, ranks: int, slots: int, reference_slots: int, gradient_bytes: int) -> float:
    """Bytes that a rank receives in gathers and gives away in reductions in a step: all but its own part of each.

    Args:
        parameters: N.
        ranks: that share them.
        slots: micro-batches.
        reference_slots: forward passes of the reference.
        gradient_bytes: of an element that is reduced.
    """
    per_element = WEIGHT_BYTES * (2 * slots + reference_slots) + gradient_bytes * slots
    return parameters * per_element * (ranks - 1) / ranks


def count(
    steps: Sequence[Sequence[ExampleSize]], setting: Setting, models: Sequence[Model], gradient_bytes: int | None
) -> dict[str, Work]:
    """Every system's work, averaged over steps.

    Args:
        steps: the sizes of each step's examples.
        setting: ranks and token budgets.
        models: the columns.
        gradient_bytes: of all systems alike; None: as each has them by default.
    """
    layouts = [layouts_of(sizes, setting, models[0].cost) for sizes in steps]
    pairs = sum(len(single_pairs(sizes)) for sizes in steps)
    found = {}
    for system in SYSTEMS:
        own = [step[system.layout] for step in layouts]
        found[system.name] = _work(system, own, pairs, setting.ranks, models, gradient_bytes or system.gradient_bytes)
    return found


def _work(
    system: System, steps: Sequence[Layout], pairs: int, ranks: int, models: Sequence[Model], gradient_bytes: int
) -> Work:
    asked = [step.reference_slots if system.asks_reference else 0 for step in steps]
    slots = [step.slots for step in steps]
    operations, traffic = [], []
    for model in models:
        total = sum(policy_operations(step, model.cost) for step in steps)
        if system.asks_reference:
            total += sum(reference_operations(step, model.cost) for step in steps)
        operations.append(total / pairs)
        moved = (
            moved_bytes(model.shape.parameters, ranks, own, reference, gradient_bytes)
            for own, reference in zip(slots, asked, strict=True)
        )
        traffic.append(sum(moved) / len(steps))
    return Work(
        tokens=sum(row.input_tokens(step.share_prompts) for step in steps for row in step.rows) / pairs,
        scored=sum(sum(row.completions) for step in steps for row in step.scored) / pairs,
        operations=tuple(operations),
        slots=sum(slots) / len(steps),
        elements=sum(map(moved_elements, slots, asked)) / len(steps),
        traffic=tuple(traffic),
    )


def _split(cost: CostModel) -> tuple[CostModel, CostModel, CostModel]:
    """The body's matrices, attention, and the head, each on its own."""
    return (
        replace(cost, attention=(), per_scored_token=0.0),
        replace(cost, per_token=0.0, per_scored_token=0.0),
        replace(cost, per_token=0.0, attention=()),
    )
