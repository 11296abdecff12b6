"""How even the packer keeps ranks, on the lengths of a run's own data.

python -m benchmarks.packing RUN.yaml [section.key=value ...] [--shape RANKSxEXAMPLES ...] [--steps 200]

Model, data and token budgets are the run's; an example costs what it does there. `simulated.py` says what the columns
are. Nothing is computed but plans, and no process group is made: any number of ranks can be asked for on any machine.
"""

import argparse
import re
from collections.abc import Sequence

from benchmarks.packing.simulated import HEADER, simulate, steps_of
from dpo_dist.cli.prepare import Prepared, prepare
from dpo_dist.cli.starting import cache_dir, quiet_imports, user_errors
from dpo_dist.config import load_config
from dpo_dist.packing import sizes_of

SHAPES = ("8x64", "8x256", "64x256", "64x1024", "64x4096", "512x2048", "512x8192")  # ranks, examples of a step


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", help="section.key=value ...")
    parser.add_argument("--shape", action="append", type=_shape, help="may be given several times")
    parser.add_argument("--steps", type=int, default=200, help="of each shape")
    options = parser.parse_intermixed_args()
    with user_errors():
        config = load_config(options.config, options.overrides)
        quiet_imports()
        prepared = prepare(config, cache_dir())
        _print(prepared, options.shape or [_shape(shape) for shape in SHAPES], options.steps)


def _print(prepared: Prepared, shapes: Sequence[tuple[int, int]], num_steps: int) -> None:
    sizes = sizes_of(prepared.dataset, range(len(prepared.dataset)))
    packer = prepared.packer(1)
    tokens = sorted(size.input_tokens(packer.share_prompts) for size in sizes)
    print(
        f"{len(sizes)} examples of {tokens[0]} to {tokens[-1]} packed tokens, mean {sum(tokens) / len(tokens):.0f}; "
        f"micro-batches of {packer.max_tokens} tokens, of the reference {packer.reference_max_tokens}; "
        f"{num_steps} steps\n\n{HEADER}"
    )
    for ranks, examples in shapes:
        steps = steps_of(len(sizes), examples, num_steps, prepared.config.train.seed)
        print(simulate(prepared.packer(ranks), sizes, steps).row, flush=True)


def _shape(text: str) -> tuple[int, int]:
    if (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)) is None:
        raise argparse.ArgumentTypeError(f"{text} is no shape; write RANKSxEXAMPLES, such as 64x1024")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
