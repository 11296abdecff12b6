"""Where the time of one steady step goes: the part `profile`, and what it reads from torch's trace."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from benchmarks.gpu_kit.kit import WARM_UP_STEPS, Failed, Kit
from benchmarks.gpu_kit.throughput import config_of, model_of, pairs_of, write_inputs
from dpo_dist.profiling import communication_in, covered

STEP_NAME = "one step"  # what traced.py calls the step in the trace
TRACE_FILE = "trace.json.gz"
LAUNCH_SECONDS = 120.0
TOP = 12
LONGEST_NAME = 80  # characters; names of kernels are types of C++
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
# What makes the host wait; a copy to pageable memory does so as well, and says it by a synchronisation of its own.
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}

Event = dict[str, Any]


def profile(kit: Kit) -> dict[str, Any]:
    """A short run with shared prompts, one step of it traced; the trace lies beside gpu.json."""
    if not (pairs_of(kit).is_file() and model_of(kit).is_dir()):
        write_inputs(kit)
    config = config_of(kit, "on")
    config["train"] |= {"max_steps": WARM_UP_STEPS + 2, "self_check": False}
    raw = kit.work / TRACE_FILE
    kit.train("profile", config, by=("benchmarks.gpu_kit.traced", str(raw)), limit=LAUNCH_SECONDS)
    with gzip.open(raw, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    # The machine's name and a folder of its own are nobody's business.
    shown = {key: value for key, value in trace.items() if key not in ("host_name", "traceName")}
    with gzip.open(kit.out / TRACE_FILE, "wt", encoding="utf-8") as file:
        json.dump(shown, file)
    found = {"trace": TRACE_FILE, "step": WARM_UP_STEPS + 1, "rank": 0} | summary(trace)
    if kit.environment["gpus"] and found["device"] == "cpu":
        raise Failed("torch's profiler saw no kernel on the GPU; it may not be allowed to use CUPTI", found)
    return found


def summary(trace: dict[str, Any]) -> dict[str, Any]:
    """The first rank's step by operators; on a GPU by kernels, with what the host waited for.

    Args:
        trace: of torch's profiler as it is written for chrome; times in microseconds.

    Raises:
        Failed: the step is not in it, or nothing else is.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if (event.get("cat"), event["name"]) == ("user_annotation", STEP_NAME)]
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    if len(steps) != 1 or not operators:
        raise Failed(f"the trace holds {len(steps)} steps and {len(operators)} operators")
    whole = steps[0]["dur"]
    found = {"step_seconds": whole / 1e6, "device": "gpu" if kernels else "cpu"}
    talked = communication_in(events)
    collectives = {
        "calls": sum(event["name"].startswith("nccl" if kernels else "gloo:") for event in kernels or events),
        "share": talked.seconds * 1e6 / whole,
        "share_with_nothing_beside": talked.exposed * 1e6 / whole,
    }
    if not kernels:
        return {**found, "top": _top(_own_times(operators), whole), "collectives": collectives}
    return {
        **found,
        "top": _top(((event["name"], event["dur"]) for event in kernels), whole),
        "busy_share": covered(kernels) / whole,
        "collectives": collectives,
        "host_waits": _count(event["name"] for event in events if event["name"] in WAITS),
        "copies": _count(event["name"] for event in kernels if event["cat"] == "gpu_memcpy"),
    }


def _own_times(operators: list[Event]) -> Iterable[tuple[str, float]]:
    """Each operator's time without that of the operators inside it, thread by thread."""
    own = [event["dur"] for event in operators]
    open_ones: dict[Any, list[int]] = defaultdict(list)
    for index in sorted(range(len(operators)), key=lambda i: (operators[i]["ts"], -operators[i]["dur"])):
        event, stack = operators[index], open_ones[operators[index]["tid"]]
        while stack and _end(operators[stack[-1]]) <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    return ((event["name"], time) for event, time in zip(operators, own, strict=True))


def _top(times: Iterable[tuple[str, float]], whole: float) -> list[dict[str, Any]]:
    """The names with most time, with their number of calls."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, time in times:
        by_name[name].append(time)
    longest = sorted(by_name, key=lambda name: -sum(by_name[name]))[:TOP]
    return [
        {
            "name": name[:LONGEST_NAME],
            "calls": len(by_name[name]),
            "seconds": sum(by_name[name]) / 1e6,
            "share": sum(by_name[name]) / whole,
        }
        for name in longest
    ]


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name] += 1
    return dict(counts)
