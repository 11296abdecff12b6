"""How fast TRL's DPOTrainer does the same work: the part `trl`.

Whether it is the same is measured: both runs log the same quantities for the same pairs, and these must be close.
"""

import json
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from benchmarks.gpu_kit.ceilings import share_of_products
from benchmarks.gpu_kit.kit import WARM_UP_STEPS, Failed, Kit, Skipped, largest
from benchmarks.gpu_kit.throughput import config_of, model_of, pairs_of, run_folder, timed_lines, useful_speed
from dpo_dist.config.models import LossConfig, ModelConfig, TrainConfig
from tests.golden.trajectories import lines_of

LAUNCH_SECONDS = 120.0
COMPARED_STEPS = 3
# Largest relative distance of what TRL logs in these steps from what our run does: those of `golden` between kernels.
# With random weights the losses stay at log 2 = 0.693; that the pass over the tokens and the gradient are the same is
# what log-probabilities and the gradient's norm say. Seen on a CPU: loss 4e-5, norm 1e-4, log-probabilities 1e-5.
BOUNDS = {"loss": 0.01, "grad_norm": 0.02, "logps/chosen": 0.002, "logps/rejected": 0.002}
SAME = (
    "weights and architecture; policy and reference both sharded by the same DeepSpeed file; bfloat16 with float32 "
    "masters; the same pairs, as token ids, in the same steps, with the same number for each update; beta; AdamW's "
    "learning rate with its schedule, betas and epsilon, no decay, clipping; activations recomputed; "
    "one log line for each step"
)
NOT_SAME = (
    "TRL computes every prompt twice and pads the pairs of a micro-batch to the longest; we pack tokens without "
    "padding. TRL scores the reference with each micro-batch, we in larger ones. Kernels of attention are those "
    "named; the optimizer's code and whatever is not named are each one's default"
)


def trl(kit: Kit) -> dict[str, Any]:
    """TRL with some sizes of micro-batches; the ratio is ours over the fastest of them, one run each."""
    if find_spec("trl") is None:
        raise Skipped("TRL is not installed; pip install trl to compare")
    if not (run_folder(kit, "on") / "observed-0.json").is_file():
        raise Skipped("the run of the part `throughput` that it is compared with was not made or did not end")
    ours = _ours(kit)
    values: dict[str, Any] = {
        "the same": SAME,
        "not the same": NOT_SAME,
        "bounds": BOUNDS,
        "warm_up_steps": WARM_UP_STEPS,
        "ours": ours,
        "runs": [],
    }
    obstacles: list[Failed | Skipped] = []
    for pairs_at_once in kit.sizes.trl_pairs:
        try:
            run = _measured(kit, pairs_at_once)
            values["runs"].append(run | their_speed(kit, ours["prompts shared: on"], run["pairs_per_second"]))
        except (Failed, Skipped) as obstacle:
            obstacles.append(obstacle)
    runs = values["runs"]
    if not runs:
        raise Failed("; ".join(map(str, obstacles)), values) if _failed(obstacles) else obstacles[0]
    wrong = [f"{run['pairs_at_once']} pairs at once: {fault}" for run in runs for fault in run["faults"]]
    if wrong:
        raise Failed("not the same work: " + "; ".join(wrong), values)
    best = max(run["pairs_per_second"] for run in runs)
    values["pairs_per_second_over_trl"] = {name: one["pairs_per_second"] / best for name, one in ours.items()}
    # One size that does not fit, or for which there was no time, takes nothing from another that was measured.
    values["left_out"] = [str(obstacle) for obstacle in obstacles]
    return values


def _failed(obstacles: list[Failed | Skipped]) -> bool:
    return any(isinstance(one, Failed) for one in obstacles)


def _ours(kit: Kit) -> dict[str, Any]:
    """Our runs of the part `throughput`, with and without sharing, as far as they ended."""
    found = {}
    for sharing in ("on", "off"):
        folder = run_folder(kit, sharing)
        if (folder / "observed-0.json").is_file():
            seen = kit.observations(folder)
            found[f"prompts shared: {sharing}"] = {
                "kernel": seen[0]["kernel"],
                "pairs_per_second": _pace(kit, [line["time/step"] for line in timed_lines(folder)]),
                **useful_speed(kit, folder),
                "peak_bytes": seen[0]["peak_bytes"],
            }
    return found


def their_speed(kit: Kit, ours: dict[str, Any], pairs_per_second: float) -> dict[str, Any]:
    """As `useful_speed` says it: the same pairs ask for the same operations."""
    tflops = ours["useful_tflops"] / ours["pairs_per_second"] * pairs_per_second
    return {"useful_tflops": tflops, "share_of_ceiling": share_of_products(kit, tflops)}


def _pace(kit: Kit, seconds: list[float]) -> float:
    return kit.sizes.examples_per_rank * kit.num_ranks * len(seconds) / sum(seconds)


def _measured(kit: Kit, pairs_at_once: int) -> dict[str, Any]:
    """One launch of TRL, and its distance from our run."""
    name = f"trl-{pairs_at_once}-at-once"
    out, path = kit.work / f"{name}.json", kit.work / f"{name}-settings.json"
    path.write_text(json.dumps(_settings(kit, pairs_at_once) | {"out": str(out), "folder": str(kit.work / name)}))
    kit.run(kit.num_ranks, name, "benchmarks.gpu_kit.trl_run", str(path), limit=LAUNCH_SECONDS)
    found = json.loads(out.read_text(encoding="utf-8"))
    ends = found["ends"][WARM_UP_STEPS - 1 :]
    seconds = [later - earlier for earlier, later in pairwise(ends)]
    ours = lines_of(run_folder(kit, "on"))[:COMPARED_STEPS]
    return {
        "pairs_at_once": pairs_at_once,
        "version": found["version"],
        "kernel": found["kernel"],
        "optimizer": found["optimizer"],
        "steps": len(seconds),
        "pairs_per_second": _pace(kit, seconds),
        "peak_bytes": found["peak_bytes"],
    } | compare(ours, found["logs"][:COMPARED_STEPS])


def _settings(kit: Kit, pairs_at_once: int) -> dict[str, Any]:
    """What TRL is told: our run's own settings."""
    config = config_of(kit, "on")
    model, train, loss = ModelConfig(**config["model"]), TrainConfig(output_dir="x", **config["train"]), LossConfig()
    return {
        "model": str(model_of(kit)),
        "pairs": str(pairs_of(kit)),
        "vocabulary": kit.sizes.model["vocab_size"],
        "deepspeed": config["parallel"]["deepspeed"],
        "gradient_checkpointing": model.gradient_checkpointing,
        "pairs_at_once": pairs_at_once,
        "micro_batches": kit.sizes.examples_per_rank // pairs_at_once,
        "steps": kit.sizes.steps,
        "warm_up": WARM_UP_STEPS,
        "beta": loss.beta * (2 if kit.plant == "beta" else 1),
        "learning_rate": train.learning_rate,
        "schedule": train.lr_scheduler_type,
        "max_grad_norm": train.max_grad_norm,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Both runs' first steps side by side, their largest relative distances, and what is outside of the bounds."""
    rows, tokens = [], 0
    for line, other in zip(ours, theirs, strict=True):
        tokens += line["tokens_unshared"]
        both = {key: [line[key], other[key]] for key in BOUNDS}
        rows.append({"step": line["step"], **both, "num_tokens": [tokens, round(other["num_tokens"])]})
    distance = {key: largest(abs(row[key][1] / row[key][0] - 1) for row in rows) for key in BOUNDS}
    # Written so that a NaN is outside.
    faults = [f"{key} {distance[key]:.1e} > {bound:.1e}" for key, bound in BOUNDS.items() if not distance[key] <= bound]
    faults += [
        f"step {row['step']}: {row['num_tokens'][1]} tokens, ours {row['num_tokens'][0]}"
        for row in rows
        if row["num_tokens"][0] != row["num_tokens"][1]
    ]
    return {"first_steps": rows, "distance": distance, "faults": faults}
