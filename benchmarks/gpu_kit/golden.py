"""Does training on this machine equal what was recorded elsewhere?

In float32 a run must equal TRL's recorded one (`tests/golden`). bfloat16 has no recorded numbers: each kernel is held
against our own float32 run of the same case, and the distance is reported.
"""

from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.kit import Failed, Kit, Skipped, largest
from tests.golden.trajectories import case_config, compare_run, lines_of, load_case

# Largest distance of a bfloat16 run from the float32 one over all steps; each is reported, and each must be inside.
# Seen on a CPU with sdpa: loss 3e-3, norm 6e-3, log-probabilities 4e-4, margins 4e-3. Faults planted in attention were
# outside: a mask aligned at the top left 4e-2, 7e-2, 2e-2, 6e-2; prompts unseen or the future seen, more than 3e-2 of
# the loss; logits doubled 2e-2, 4e-2, 3e-3, 3e-2; even values a tenth too large 1.4e-2, 2.4e-2, 2e-3, 1.8e-2.
RELATIVE_BOUNDS = {"loss": 0.01, "grad_norm": 0.02, "logps/chosen": 0.002, "logps/rejected": 0.002}
ABSOLUTE_BOUNDS = {"rewards/margins": 0.015}
LAUNCH_SECONDS = 90.0  # six steps of a tiny model: more is a rank that waits for ever
BOUNDS = {**RELATIVE_BOUNDS, **ABSOLUTE_BOUNDS}


def golden(kit: Kit) -> dict[str, Any]:
    """The recorded cases in float32, and the first of them in bfloat16 with every kernel there is, under ZeRO-3."""
    runs = [_recorded(kit, name) for name in kit.sizes.cases]
    runs += [_halved(kit, kernel, found) for kernel, found in kit.environment["kernels"].items()]
    values = {"bounds of bfloat16": BOUNDS, "runs": runs}
    wrong = [f"{run['dtype']} {run['kernel']} {run['case']}" for run in runs if run["status"] == "failed"]
    if wrong:
        raise Failed("not as it must be: " + ", ".join(wrong), values)
    if all(run["status"] == "skipped" for run in runs):
        raise Skipped(runs[0]["reason"])
    return values


def _recorded(kit: Kit, name: str) -> dict[str, Any]:
    """A float32 run against TRL's."""
    case = load_case(name)
    about = {"case": name, "dtype": "float32", "kernel": "sdpa", "ranks": kit.num_ranks}
    config = _config(kit, name, "float32", "sdpa")
    if kit.plant == "beta":
        config["loss"]["beta"] *= 2
    try:
        folder = kit.train(_run_name(name, "float32", "sdpa"), config, limit=LAUNCH_SECONDS)
    except Skipped as skipped:
        return {**about, "status": "skipped", "reason": str(skipped)}
    except Failed as failed:
        return {**about, "status": "failed", "reason": str(failed)}
    differences = compare_run(folder, case)
    status = {"status": "failed" if differences else "ok"}
    return {**about, **status, "steps": case.steps, "distance": _distance(lines_of(folder), case.logs)} | (
        {"reason": f"{len(differences)} differences, the first: {differences[0]}"} if differences else {}
    )


def _halved(kit: Kit, kernel: str, found: dict[str, Any]) -> dict[str, Any]:
    """A bfloat16 run against the float32 one of the same case."""
    name = kit.sizes.cases[0]
    about = {"case": name, "dtype": "bfloat16", "kernel": kernel, "ranks": kit.num_ranks}
    if not found["usable"]:
        return {**about, "status": "skipped", "reason": found["reason"]}
    exact = kit.work / _run_name(name, "float32", "sdpa")
    if len(_lines(exact)) != load_case(name).steps:
        return {**about, "status": "skipped", "reason": "there is no float32 run to compare with"}
    try:
        config = _config(kit, name, "bfloat16", kernel)
        folder = kit.train(_run_name(name, "bfloat16", kernel), config, limit=LAUNCH_SECONDS)
    except Skipped as skipped:
        return {**about, "status": "skipped", "reason": str(skipped)}
    except Failed as failed:
        return {**about, "status": "failed", "reason": str(failed)}
    distance = _distance(_lines(folder), _lines(exact))
    # Written so that a NaN is outside.
    outside = [
        f"{key} {distance[key]:.1e} > {bound:.1e}" for key, bound in BOUNDS.items() if not distance[key] <= bound
    ]
    status = {"status": "failed", "reason": "; ".join(outside)} if outside else {"status": "ok"}
    return {**about, **status, "steps": load_case(name).steps, "distance": distance}


def _config(kit: Kit, name: str, dtype: str, kernel: str) -> dict[str, Any]:
    config = case_config(load_case(name), kit.work)
    config["model"] |= {"dtype": dtype, "attn_implementation": kernel}
    config["parallel"]["deepspeed"] = "zero3_bf16" if dtype == "bfloat16" else "zero3"
    if "_ga" in name:
        config["packing"]["max_tokens"] = 130  # TRL accumulated micro-batches in these: so do we
    return config


def _run_name(case: str, dtype: str, kernel: str) -> str:
    return f"golden-{case}-{dtype}-{kernel}"


def _lines(folder: Path) -> list[dict[str, Any]]:
    return lines_of(folder) if (folder / "metrics.jsonl").is_file() else []


def _distance(lines: list[dict[str, Any]], others: Any) -> dict[str, float]:
    """Largest differences over the steps: relative, of margins absolute."""
    pairs = list(zip(lines, others, strict=True))
    relative = {key: largest(abs(a[key] / b[key] - 1) for a, b in pairs) for key in RELATIVE_BOUNDS}
    return relative | {key: largest(abs(a[key] - b[key]) for a, b in pairs) for key in ABSOLUTE_BOUNDS}
