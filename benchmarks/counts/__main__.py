"""Tokens, operations and ZeRO-3 bytes of ours and of other systems, on the lengths of real data.

python -m benchmarks.counts DATA [DATA ...] [section.key=value ...] [--examples 256 --examples 1024] [--ranks 64]

DATA is a run's configuration, whose data, tokenizer, token budgets and seed are taken (overrides hold for all of them),
or a data set of arXiv:2410.20305 by the medians that the paper gives, with random lengths around them: capybara,
hh-rlhf, metamath, tldr, helpsteer, ultrafeedback, or `medians:LENGTH,RATIO`. `layouts.py` says what each system
computes, and where that is from. Nothing is trained, and no process group is made.
"""

import argparse
import sys

import typer

from benchmarks.counts.counting import Model, count
from benchmarks.counts.layouts import Setting, largest_batch
from benchmarks.counts.lengths import Data, Spread, is_medians, of_medians, of_run
from benchmarks.counts.page import Counted, summary, table
from benchmarks.counts.shapes import SHAPES
from benchmarks.packing.simulated import steps_of
from dpo_dist.cli.starting import quiet_imports, user_errors


def main() -> None:
    """Count and print."""
    options = _options()
    names = [name for name in options.data if "=" not in name]
    overrides = [name for name in options.data if "=" in name]
    spread = Spread(options.sigma, options.longest, options.rows, options.seed)
    if not names:
        sys.exit("error: name a run's configuration, or a data set of arXiv:2410.20305")
    quiet_imports()
    models = [Model.of(SHAPES[name], options.recomputation) for name in options.model or SHAPES]
    shapes = [model.shape.name for model in models]
    found: dict[tuple[str, int], Counted] = {}
    for name in names:
        data = _data(name, overrides, spread, options.max_tokens)
        for examples in options.examples or (256, 1024):
            counted, heading = _counted(data, examples, models, options)
            found[data.name, examples] = counted
            print(f"{heading}\n\n{table(counted, shapes)}\n", flush=True)
    print(summary(found, shapes[0]))


def _data(name: str, overrides: list[str], spread: Spread, max_tokens: int) -> Data:
    """Leaves with a message and its exit code where a user made a mistake."""
    try:
        with user_errors():
            return of_medians(name, spread, max_tokens) if is_medians(name) else of_run(name, overrides)
    except typer.Exit as mistake:
        sys.exit(mistake.exit_code)


def _counted(data: Data, examples: int, models: list[Model], options: argparse.Namespace) -> tuple[Counted, str]:
    """Every system's work on one data set, and a line that says what was counted."""
    batch = options.trl_batch or largest_batch(data.sizes, data.max_tokens)
    setting = Setting(options.ranks, data.max_tokens, data.reference_max_tokens, batch)
    steps = [
        [data.sizes[row] for row in rows] for rows in steps_of(len(data.sizes), examples, options.steps, data.seed)
    ]
    pairs = sum(len(size.pairs) for size in data.sizes)
    heading = (
        f"{data.name}: {len(data.sizes)} examples, {pairs} pairs; {examples} examples a step on {options.ranks} ranks, "
        f"micro-batches of {data.max_tokens} tokens, TRL's of {batch} pairs; {options.steps} steps; "
        f"recomputation {'on' if options.recomputation else 'off'}"
    )
    return count(steps, setting, models, options.gradient_bytes), heading


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATA", help="and section.key=value ...")
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be given several times")
    parser.add_argument("--examples", action="append", type=_positive, help="of a step; may be given several times")
    parser.add_argument("--ranks", type=_positive, default=64)
    parser.add_argument("--steps", type=_positive, default=20, help="that are averaged over")
    parser.add_argument("--trl-batch", type=_positive, help="pairs of TRL's micro-batch; else the most that always fit")
    parser.add_argument("--no-recomputation", dest="recomputation", action="store_false", help="in all systems")
    parser.add_argument("--gradient-bytes", type=int, choices=(2, 4), help="in all systems; else as each has them")
    parser.add_argument("--max-tokens", type=_positive, default=8192, help="of a micro-batch; a run has its own")
    parser.add_argument("--sigma", type=float, default=0.6, help="spread of the logarithm of random lengths")
    parser.add_argument("--longest", type=_positive, default=4096, help="random prompt and completion, tokens")
    parser.add_argument("--rows", type=_positive, default=4000, help="random examples")
    parser.add_argument("--seed", type=int, default=42, help="of random lengths")
    return parser.parse_intermixed_args()


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


if __name__ == "__main__":
    main()
