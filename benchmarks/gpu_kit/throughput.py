"""How fast a step is, with every prompt computed once and with a copy for each completion; and what it holds.

Random weights and random tokens: speed does not depend on what they mean. Lengths are log-normal, as those of chat data
are roughly; their quantiles are reported with the numbers.
"""

import json
import math
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.ceilings import share_of_products
from benchmarks.gpu_kit.kit import OBSERVED, WARM_UP_STEPS, Failed, Kit, Sizes, Skipped
from tests.golden.trajectories import lines_of

PROMPT_SIGMA, COMPLETION_SIGMA = 0.9, 0.7
SHORTEST = 8  # tokens
LAUNCH_SECONDS = 180.0
# DeepSpeed fills its flat buffers up, by some elements of each parameter.
MEMORY_TOLERANCE, SMALL_BYTES = 0.02, 4096


def throughput(kit: Kit) -> dict[str, Any]:
    """The same examples with and without prompt sharing; one of the two is measured also where the other fails."""
    values = {
        "sizes": kit.sizes.name,
        "why": kit.sizes.why,
        "model": kit.sizes.model,
        "dtype": "bfloat16",
        "deepspeed": "zero3_bf16",
        "ranks": kit.num_ranks,
        "examples_per_step": kit.sizes.examples_per_rank * kit.num_ranks,
        "max_tokens": kit.sizes.max_tokens,
        "lengths": write_inputs(kit),
        "prefix_sharing": {},
    }
    obstacles: list[Failed | Skipped] = []
    for sharing in ("on", "off"):
        try:
            values["prefix_sharing"][sharing] = _measured(kit, sharing)
        except (Failed, Skipped) as obstacle:
            obstacles.append(obstacle)
    runs = values["prefix_sharing"]
    if obstacles:
        if not runs and all(isinstance(one, Skipped) for one in obstacles):
            raise obstacles[0]
        raise Failed("; ".join(map(str, obstacles)), values)
    values["pairs_per_second_gain"] = runs["on"]["pairs_per_second"] / runs["off"]["pairs_per_second"]
    return values


def memory(kit: Kit) -> dict[str, Any]:
    """What each rank of the run with shared prompts holds, against ZeRO-3's closed form; the rest is activations."""
    folder = run_folder(kit, "on")
    if not (folder / "observed-0.json").is_file():
        raise Skipped("the run of the part `throughput` that it would describe was not made or did not end")
    ranks = []
    for rank, seen in enumerate(kit.observations(folder)):
        held, expected = seen["held_bytes"], seen["expected_bytes"]
        ranks.append(
            {
                "rank": rank,
                "held_bytes": held,
                "closed_form_bytes": expected,
                "rest_bytes": seen["peak_bytes"] - sum(held.values()),
                "peak_bytes": seen["peak_bytes"],
                "reserved_bytes": seen["reserved_bytes"],
            }
        )
    on_gpu = bool(kit.environment["gpus"])
    rest = "activations, gathered layers, buckets, at the worst moment since the start of the process"
    rest += "" if on_gpu else "; on a CPU the interpreter with its libraries as well"
    values = {"tolerance": MEMORY_TOLERANCE, "rest is": rest, "ranks": ranks}
    wrong = memory_faults(ranks)
    if wrong:
        raise Failed("not what ZeRO-3's closed form says: " + "; ".join(wrong), values)
    return values


def memory_faults(ranks: list[dict[str, Any]]) -> list[str]:
    """Where what is held is not what the closed form says."""
    faults = []
    for one in ranks:
        for category, expected in one["closed_form_bytes"].items():
            held = one["held_bytes"][category]
            if not math.isclose(held, expected, rel_tol=MEMORY_TOLERANCE, abs_tol=SMALL_BYTES):
                faults.append(f"rank {one['rank']} holds {held} bytes of {category}, expected {expected}")
    return faults


def _measured(kit: Kit, sharing: str) -> dict[str, Any]:
    return trained(kit, run_folder(kit, sharing).name, config_of(kit, sharing))


def trained(kit: Kit, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train, and return numbers of the run after its first steps."""
    folder = kit.train(name, config, by=OBSERVED, limit=LAUNCH_SECONDS)
    lines = timed_lines(folder)
    seen = kit.observations(folder)
    seconds = [line["time/step"] for line in lines]
    tokens, unshared = (sum(line[key] for line in lines) for key in ("tokens_processed", "tokens_unshared"))
    examples = kit.sizes.examples_per_rank * kit.num_ranks * len(lines)
    return {
        "kernel": seen[0]["kernel"],
        "num_parameters": seen[0]["num_parameters"],
        "steps": len(lines),
        "seconds_per_step": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "tokens_per_second": tokens / sum(seconds),
        "pairs_per_second": examples / sum(seconds),
        **useful_speed(kit, folder),
        "tokens_processed": tokens,
        "tokens_unshared": unshared,
        "peak_bytes_of_ranks": [one["peak_bytes"] for one in seen],
        "reserved_bytes_of_ranks": [one["reserved_bytes"] for one in seen],
    }


def useful_speed(kit: Kit, folder: Path) -> dict[str, Any]:
    """Operations that the pairs ask for, in 10^12 per second over all ranks, and their share of the measured ceiling.

    Of the policy's forward and backward and the reference's forward; every prompt once, nothing that is computed again.
    """
    lines = timed_lines(folder)
    used = sum(line["mfu"] * line["time/step"] for line in lines) / sum(line["time/step"] for line in lines)
    tflops = used * kit.observations(folder)[0]["peak_flops"] * kit.num_ranks / 1e12
    return {"useful_tflops": tflops, "share_of_ceiling": share_of_products(kit, tflops)}


def timed_lines(folder: Path) -> list[dict[str, Any]]:
    """What a run logged after its first steps."""
    return lines_of(folder)[WARM_UP_STEPS:]


def model_of(kit: Kit) -> Path:
    """The folder of the random model."""
    return kit.work / "model"


def pairs_of(kit: Kit) -> Path:
    """The file of the random pairs."""
    return kit.work / "pairs.jsonl"


def run_folder(kit: Kit, sharing: str) -> Path:
    """Of the run with prompts shared (`on`) or not (`off`)."""
    return kit.work / f"throughput-sharing-{sharing}"


def config_of(kit: Kit, sharing: str) -> dict[str, Any]:
    """The run's configuration, with prompts shared (`on`) or not (`off`)."""
    sizes = kit.sizes
    return {
        "model": {
            "model_name_or_path": str(model_of(kit)),
            "dtype": "bfloat16",
            "prefix_sharing": sharing,
            "gradient_checkpointing": True,  # as TRL is told to; `auto` would keep what this machine has room for
        },
        "data": {"train": [{"path": str(pairs_of(kit))}]},
        "train": {
            "examples_per_step": sizes.examples_per_rank * kit.num_ranks,
            "max_steps": sizes.steps,
            "learning_rate": 1e-6,
            "shuffle": False,
        },
        "packing": {"max_tokens": sizes.max_tokens},
        "parallel": {"deepspeed": "zero3_bf16"},
        "log": {"report_to": []},
    }


def write_inputs(kit: Kit) -> dict[str, Any]:
    """The model and the pairs; returns quantiles of lengths."""
    write_model(kit)
    return write_pairs(kit)


def write_model(kit: Kit) -> None:
    """In the place of the one that was there."""
    shutil.rmtree(model_of(kit), ignore_errors=True)
    longest = kit.sizes.prompt[1] + kit.sizes.completion[1]
    sizes = json.dumps({**kit.sizes.model, "max_position_embeddings": longest})
    kit.run(1, "random-model", "benchmarks.gpu_kit.random_model", str(model_of(kit)), sizes, limit=120)


def write_pairs(kit: Kit) -> dict[str, Any]:
    """For all steps; returns quantiles of lengths."""
    rows = random_rows(kit.sizes, kit.sizes.examples_per_rank * kit.num_ranks * kit.sizes.steps)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    pairs_of(kit).write_text(text, encoding="utf-8")
    prompts = sorted(len(row["prompt_ids"]) for row in rows)
    completions = sorted(len(row[key]) for row in rows for key in ("chosen_ids", "rejected_ids"))
    return {"prompt": _quantiles(prompts), "completion": _quantiles(completions)}


def random_rows(sizes: Sizes, number: int) -> list[dict[str, list[int]]]:
    """Pairs of token ids, the same every time."""
    source = random.Random(0)

    def ids(median: int, sigma: float, longest: int) -> list[int]:
        length = min(max(round(source.lognormvariate(math.log(median), sigma)), SHORTEST), longest)
        return [source.randrange(sizes.model["vocab_size"]) for _ in range(length)]

    return [
        {
            "prompt_ids": ids(sizes.prompt[0], PROMPT_SIGMA, sizes.prompt[1]),
            "chosen_ids": ids(sizes.completion[0], COMPLETION_SIGMA, sizes.completion[1]),
            "rejected_ids": ids(sizes.completion[0], COMPLETION_SIGMA, sizes.completion[1]),
        }
        for _ in range(number)
    ]


def _quantiles(lengths: list[int]) -> dict[str, float]:
    deciles = statistics.quantiles(lengths, n=10)
    return {
        "mean": statistics.mean(lengths),
        "10%": deciles[0],
        "50%": deciles[4],
        "90%": deciles[8],
        "longest": lengths[-1],
    }
