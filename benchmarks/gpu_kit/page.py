"""gpu.json as a page that a person reads."""

from collections.abc import Callable, Iterator
from typing import Any

MIB = 2**20


def page(report: dict[str, Any]) -> str:
    """Markdown."""
    sections = report["sections"]
    lines = ["# dpo_dist on this machine", "", f"{report['seconds']:.0f} s. The numbers in full are in gpu.json.", ""]
    lines += ["| part | status | s | why |", "|---|---|---|---|"]
    for name, one in sections.items():
        lines.append(f"| {name} | {one['status']} | {one['seconds']:.0f} | {_cell(one.get('reason', ''))} |")
    for name, writer in _WRITERS.items():
        values = sections.get(name, {}).get("values")
        if values:
            lines += ["", f"## {name}", "", *writer(values)]
    return "\n".join(lines) + "\n"


def _environment(values: dict[str, Any]) -> Iterator[str]:
    changed = " (changed)" if values["checkout_is_changed"] else ""
    yield f"- {values['date']}, commit {values['commit']}{changed}, Python {values['python']}, {values['system']}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in values["packages"].items() if version)
    yield f"- CUDA {values['cuda']}, driver {values['driver']}, NCCL {values['nccl']}"
    yield f"- flash-attn package: {values['flash_attn_taken']}"
    yield f"- float32 matrix products: {values['float32_matmul_precision']}; variables: {values['variables'] or 'none'}"
    for gpu in values["gpus"]:
        yield f"- {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']:.0f} GiB"
    cpu = values["cpu"]
    yield f"- {cpu['model']}, {cpu['cores']} cores, {cpu['memory_gib']:.0f} GiB"


def _golden(values: dict[str, Any]) -> Iterator[str]:
    yield "Largest distance over all steps: in float32 from TRL's recorded run, in bfloat16 from our own float32 run."
    yield ""
    keys = list(values["bounds of bfloat16"])
    yield f"| case | dtype | kernel | ranks | status | {' | '.join(keys)} | why |"
    yield "|---" * (6 + len(keys)) + "|"
    for run in values["runs"]:
        distance = run.get("distance", {})
        cells = [f"{distance[key]:.1e}" if key in distance else "" for key in keys]
        about = [str(run[key]) for key in ("case", "dtype", "kernel", "ranks", "status")]
        yield f"| {' | '.join([*about, *cells])} | {_cell(run.get('reason', ''))} |"
    bounds = [f"{bound:.1e}" for bound in values["bounds of bfloat16"].values()]
    yield f"| bound | bfloat16 | | | | {' | '.join(bounds)} | |"


def _throughput(values: dict[str, Any]) -> Iterator[str]:
    yield f"Sizes {values['sizes']}: {values['why']}."
    yield f"{values['dtype']}, {values['deepspeed']}, {values['ranks']} ranks,"
    yield f"{values['examples_per_step']} examples a step,"
    yield f"at most {values['max_tokens']} tokens in a micro-batch. Seconds per step: median, least, most."
    yield "Tokens, mean and longest:"
    yield "; ".join(f"{name} {q['mean']:.0f}, {q['longest']}" for name, q in values["lengths"].items()) + "."
    yield ""
    yield "| prompts shared | parameters | kernel | tokens/s | pairs/s | s per step | steps | peak MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for sharing, run in values["prefix_sharing"].items():
        seconds = ", ".join(f"{run['seconds_per_step'][key]:.3g}" for key in ("median", "least", "most"))
        peaks = ", ".join(f"{peak / MIB:.0f}" for peak in run["peak_bytes_of_ranks"])
        about = f"{sharing} | {run['num_parameters']:,} | {run['kernel']}"
        speed = f"{run['tokens_per_second']:.0f} | {run['pairs_per_second']:.3g}"
        yield f"| {about} | {speed} | {seconds} | {run['steps']} | {peaks} |"
    if "pairs_per_second_gain" in values:
        yield ""
        yield f"Pairs per second, shared over not shared: {values['pairs_per_second_gain']:.2f}."


def _memory(values: dict[str, Any]) -> Iterator[str]:
    yield f"MiB of each rank: held / by ZeRO-3's closed form. The rest: {values['rest is']}."
    yield ""
    categories = list(values["ranks"][0]["held_bytes"])
    yield f"| rank | {' | '.join(categories)} | rest | peak |"
    yield "|---" * (3 + len(categories)) + "|"
    for rank in values["ranks"]:
        cells = [f"{rank['held_bytes'][c] / MIB:.2f} / {rank['closed_form_bytes'][c] / MIB:.2f}" for c in categories]
        cells += [f"{rank[key] / MIB:.0f}" for key in ("rest_bytes", "peak_bytes")]
        yield f"| {rank['rank']} | {' | '.join(cells)} |"


def _self_check(values: dict[str, Any]) -> Iterator[str]:
    for run in values["runs"]:
        yield f"- {run['run']}: margin noise {run['margin_noise']} nats"
        yield from (f"  - {line}" for line in run["said"])


def _bandwidth(values: dict[str, Any]) -> Iterator[str]:
    yield f"{values['ranks']} ranks, {values['backend']}, {values['dtype']}; bus bandwidth as nccl-tests define it."
    yield ""
    yield "| bytes | all-reduce s | GB/s | all-gather s | GB/s |"
    yield "|---|---|---|---|---|"
    for line in values["sizes"]:
        reduced = f"{line['all_reduce_seconds']:.2e} | {line['all_reduce_gb_per_second']:.3g}"
        gathered = f"{line['all_gather_seconds']:.2e} | {line['all_gather_gb_per_second']:.3g}"
        yield f"| {line['bytes']} | {reduced} | {gathered} |"


def _profile(values: dict[str, Any]) -> Iterator[str]:
    yield f"Step {values['step']} of a run with prompts shared, rank {values['rank']}: {values['step_seconds']:.3g} s"
    yield f"(slower than others, for it is traced). {values['trace']} opens in a browser that shows chrome traces."
    exchanges = values["collectives"]
    yield f"Collectives: {exchanges['calls']} calls, {exchanges['share']:.0%} of the step."
    if values["device"] == "gpu":
        yield f"Nothing else ran beside them for {exchanges['share_with_nothing_beside']:.0%} of the step."
        yield f"The GPU was busy for {values['busy_share']:.0%}."
        for name in ("host_waits", "copies"):
            counts = [f"{kind} {count}" for kind, count in values[name].items()]
            yield f"{name.replace('_', ' ').capitalize()}: {', '.join(counts) or 'none'}."
    yield ""
    yield f"| {'kernel' if values['device'] == 'gpu' else 'operator'} | calls | s | of the step |"
    yield "|---|---|---|---|"
    for one in values["top"]:
        yield f"| {_cell(one['name'])} | {one['calls']} | {one['seconds']:.3g} | {one['share']:.1%} |"


def _trl(values: dict[str, Any]) -> Iterator[str]:
    yield f"The same in both: {values['the same']}."
    yield ""
    yield f"Not the same: {values['not the same']}."
    yield ""
    yield "| | pairs in a micro-batch | kernel | pairs/s | peak MiB of rank 0 |"
    yield "|---|---|---|---|---|"
    for name, ours in values["ours"].items():
        yield f"| ours, {name} | by tokens | {ours['kernel']} | {ours['pairs_per_second']:.3g} | {_mib(ours)} |"
    for run in values["runs"]:
        about = f"TRL {run['version']} | {run['pairs_at_once']} | {run['kernel']}"
        yield f"| {about} | {run['pairs_per_second']:.3g} | {_mib(run)} |"
    yield from (f"| TRL | | | | {_cell(reason)} |" for reason in values.get("left_out", []))
    for run in values["runs"]:
        yield ""
        yield f"Ours / TRL's with {run['pairs_at_once']} pairs at once, in the first steps. Largest distance and bound:"
        bounds = values["bounds"]
        yield "; ".join(f"{key} {run['distance'][key]:.1e} <= {bounds[key]:.1e}" for key in bounds) + "."
        yield ""
        columns = [*bounds, "num_tokens"]
        yield f"| step | {' | '.join(columns)} |"
        yield "|---" * (1 + len(columns)) + "|"
        for row in run["first_steps"]:
            yield f"| {row['step']} | {' | '.join('{:.7g} / {:.7g}'.format(*row[key]) for key in columns)} |"
    if "pairs_per_second_over_trl" in values:
        yield ""
        ratios = [f"{name}: {ratio:.2f}" for name, ratio in values["pairs_per_second_over_trl"].items()]
        yield f"Pairs per second, ours over TRL's fastest, one run each. {'; '.join(ratios)}."


def _mib(run: dict[str, Any]) -> str:
    return f"{run['peak_bytes'] / MIB:.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


_WRITERS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "environment": _environment,
    "golden": _golden,
    "throughput": _throughput,
    "memory": _memory,
    "self_check": _self_check,
    "bandwidth": _bandwidth,
    "profile": _profile,
    "trl": _trl,
}
