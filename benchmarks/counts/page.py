"""Tables in Markdown."""

from collections.abc import Mapping, Sequence

from benchmarks.counts.counting import OURS, Work

Counted = Mapping[str, Work]  # by system


def table(counted: Counted, shapes: Sequence[str]) -> str:
    """All numbers of one data set and step.

    Args:
        counted: of every system.
        shapes: the models' names, in the order of `Work.operations`.
    """
    ours = counted[OURS]
    operations = [f"{name}: TFLOP | over ours" for name in shapes]
    traffic = [f"{name}: GB" for name in shapes]
    lines = _head(["system", "tokens", "scored", *operations, "G", "moved, N", *traffic, "over ours"])
    for name, work in counted.items():
        per_shape = [
            f"{own / 1e12:.1f} | {own / base:.2f}" for own, base in zip(work.operations, ours.operations, strict=True)
        ]
        moved = [f"{own / 1e9:.0f}" for own in work.traffic]
        ratio = f"{work.traffic[0] / ours.traffic[0]:.2f}"
        counts = [f"{work.slots:.1f}", f"{work.elements:.1f}"]
        lines.append(_line([name, f"{work.tokens:.0f}", f"{work.scored:.0f}", *per_shape, *counts, *moved, ratio]))
    return "\n".join(lines)


def summary(found: Mapping[tuple[str, int], Counted], shape: str) -> str:
    """Operations of a pair and bytes of a step, over ours.

    Args:
        found: by data set and examples of a step.
        shape: the model whose operations are shown, the first of them.
    """
    names = [name for name in next(iter(found.values())) if name != OURS]
    lines = [f"Operations of a pair ({shape}) / ZeRO-3 bytes of a step, each over ours:", ""]
    lines += _head(["data", "examples", *names])
    for (data, examples), counted in found.items():
        ours = counted[OURS]
        cells = [
            f"{counted[name].operations[0] / ours.operations[0]:.2f} / {counted[name].traffic[0] / ours.traffic[0]:.2f}"
            for name in names
        ]
        lines.append(_line([data, str(examples), *cells]))
    return "\n".join(lines)


def _head(columns: Sequence[str]) -> list[str]:
    head = _line(columns)
    return [head, "|" + "---|" * (head.count("|") - 1)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
