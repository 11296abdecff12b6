"""What every run of the kit has measured about itself before its first update."""

from typing import Any

from benchmarks.gpu_kit.kit import Failed, Kit, Skipped
from tests.golden.trajectories import lines_of

FIRST_WORDS = "self-check"


def self_check(kit: Kit) -> dict[str, Any]:
    """Margin noise as the runs wrote it, layout noise as they said it; exact numbers of the observed ones."""
    runs = []
    for path in sorted(kit.work.glob("*/metrics.jsonl")):
        lines = lines_of(path.parent, "self_check")
        log = kit.log_of(path.parent.name)
        said = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        has_observed = (path.parent / "observed-0.json").is_file()
        runs.append(
            {
                "run": path.parent.name,
                "margin_noise": lines[0]["numerics/margin_noise"] if lines else None,
                "proof": kit.observations(path.parent)[0]["self_check"] if has_observed else None,
                "said": [line for line in said if line.startswith(FIRST_WORDS)],
            }
        )
    if not runs:
        raise Skipped("no run was made that could have checked itself")
    silent = [run["run"] for run in runs if run["margin_noise"] is None]
    if silent:
        raise Failed(f"no self-check in {', '.join(silent)}", {"runs": runs})
    return {"runs": runs}
