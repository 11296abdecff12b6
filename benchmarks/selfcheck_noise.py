"""How far honest layouts of the same examples differ: the numbers behind the bounds of `dpo_dist/noise.py`.

    python benchmarks/selfcheck_noise.py CONFIG DTYPE NUM_EXAMPLES [section.key=value ...]

One model, no engine: the first examples of the data set are scored as micro-batches with shared prompts, as ones
without, every completion alone, and in bins twice as large. Printed per layout, for the difference to the first: rms
and largest over completions, in nats per sqrt(token) and in float32 roundings of the completion's log-probability.
"""

import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.cli import cache_dir
from dpo_dist.cli.prepare import prepare
from dpo_dist.config import load_config
from dpo_dist.model import load_model
from dpo_dist.selfcheck.proof import alone
from dpo_dist.tokenization import TokenizedExample

PER_BATCH = 4  # examples of a micro-batch; bins hold twice as many


def micro_batches(examples: list[TokenizedExample], size: int, share_prompts: bool) -> Iterator[MicroBatch]:
    """The examples in order, `size` at a time; completions are counted over all of them."""
    offsets = [sum(len(e.completion_ids) for e in examples[:i]) for i in range(len(examples))]
    for start in range(0, len(examples), size):
        chosen = slice(start, start + size)
        yield build_micro_batch(examples[chosen], offsets[chosen], share_prompts)


def lonely(examples: list[TokenizedExample]) -> Iterator[MicroBatch]:
    """Every completion in a forward of its own."""
    index = 0
    for example in examples:
        for k in range(len(example.completion_ids)):
            yield alone(example, k, index)
            index += 1


@torch.no_grad()
def score(model: torch.nn.Module, batches: Iterator[MicroBatch], num_completions: int) -> Tensor:
    """log pi of every completion, float64, from float32 sums as in training."""
    logps_C = torch.zeros(num_completions, dtype=torch.float64)
    for batch in batches:
        logps_C[batch.completion_index_C] = batch.completion_sums(model(batch)).double()
    return logps_C


def main() -> None:
    """Print one line per layout."""
    config_name, dtype, num_examples, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(config_name, [f"train.output_dir={folder}/run", f"model.dtype={dtype}", *overrides])
        prepared = prepare(config, cache_dir())
    examples = [prepared.dataset[row] for row in range(min(int(num_examples), len(prepared.dataset)))]
    lengths_C = torch.tensor([len(ids) for example in examples for ids in example.completion_ids]).double()
    model = load_model(prepared.model_folder, prepared.model_config, register("sdpa"), prepared.dtype, {}, False, False)
    layouts = {
        "shared": micro_batches(examples, PER_BATCH, True),
        "unshared": micro_batches(examples, PER_BATCH, False),
        "alone": lonely(examples),
        "bins": micro_batches(examples, 2 * PER_BATCH, True),
    }
    shared_C = torch.zeros(len(lengths_C))
    print(f"{dtype}: {len(examples)} examples, completions of {lengths_C.min():.0f}-{lengths_C.max():.0f} tokens")
    for name, batches in layouts.items():
        started = time.perf_counter()
        logps_C = score(model, batches, len(lengths_C))
        seconds = time.perf_counter() - started
        if name == "shared":
            shared_C = logps_C
            print(f"{name}: {(logps_C / lengths_C).mean():.3f} nats per token, {seconds:.0f} s")
            continue
        differences_C = logps_C - shared_C
        per_root = differences_C / lengths_C.sqrt()
        roundings = differences_C / (torch.finfo(torch.float32).eps * shared_C.abs())
        margins = differences_C[0::2] - differences_C[1::2]
        halves = [per_root[lengths_C <= lengths_C.median()], per_root[lengths_C > lengths_C.median()]]
        print(
            f"{name}: per sqrt(token) rms {_rms(per_root):.1e} (shorter half {_rms(halves[0]):.1e}, longer "
            f"{_rms(halves[1]):.1e}), largest {per_root.abs().max():.1e}; in roundings of the sum rms "
            f"{_rms(roundings):.1f}, largest {roundings.abs().max():.1f}; first two completions' margin rms "
            f"{_rms(margins):.1e} nats; {seconds:.0f} s",
            flush=True,
        )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    main()
