"""gpu.json as a page that a person reads."""

from collections.abc import Callable, Iterator
from typing import Any

MIB = 2**20
RUN_COLUMNS = "parameters | kernel | tokens/s | pairs/s | useful TFLOP/s | of ceiling | s per step | steps | peak MiB"


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


def _ceilings(values: dict[str, Any]) -> Iterator[str]:
    yield f"{values['ranks']} ranks at the same time; of the slowest, by the median. Every rate below stands beside its"
    yield "share of these. A copy reads and writes: both count."
    yield ""
    yield "| of a rank | size | s | rate |"
    yield "|---|---|---|---|"
    product = f"{values['product_side']} x {values['product_side']} | {values['product_seconds']:.3g}"
    yield f"| matrix product, {values['dtype']} | {product} | {values['product_tflops_of_a_rank']:.3g} TFLOP/s |"
    copied = f"{values['copy_bytes'] / MIB:.0f} MiB | {values['copy_seconds']:.3g}"
    yield f"| copy | {copied} | {values['copy_gb_per_second_of_a_rank']:.3g} GB/s |"


def _kernels(values: dict[str, Any]) -> Iterator[str]:
    yield f"{values['dtype']}, forward and backward, shared prompts. Distances from float64, relative, in the norm;"
    yield "same bits: when it runs again. Speed is that of a full micro-batch, on one device."
    yield ""
    measured = "output | gradients of q, k, v | same bits | ms | TFLOP/s | of ceiling"
    yield f"| heads | window | kernel | status | {measured} | why |"
    yield "|---" * 11 + "|"
    for run in values["runs"]:
        about = f"{run['heads']} on {run['kv_heads']} of {run['head_dim']} | {run['window'] or 'none'}"
        about += f" | {run.get('taken', run['kernel'])} | {run['status']}"
        cells = [""] * 6
        if "distance" in run:
            output, *gradients = (f"{away:.1e}" for away in run["distance"].values())
            cells = [output, ", ".join(gradients), "yes" if run["same_bits"] else "no", f"{run['seconds'] * 1e3:.3g}"]
            cells += [f"{run['tflops']:.3g}", _share(run.get("share_of_ceiling"))]
        yield f"| {about} | {' | '.join(cells)} | {_cell(run.get('reason', ''))} |"


def _throughput(values: dict[str, Any]) -> Iterator[str]:
    yield f"Sizes {values['sizes']}: {values['why']}."
    yield f"{values['dtype']}, {values['deepspeed']}, {values['ranks']} ranks,"
    yield f"{values['examples_per_step']} examples a step, activations recomputed,"
    yield f"at most {values['max_tokens']} tokens in a micro-batch. Seconds per step: median, least, most."
    yield "Tokens, mean and longest:"
    yield "; ".join(f"{name} {q['mean']:.0f}, {q['longest']}" for name, q in values["lengths"].items()) + "."
    yield ""
    yield f"| prompts shared | {RUN_COLUMNS} |"
    yield "|---" * (1 + RUN_COLUMNS.count("|") + 1) + "|"
    for sharing, run in values["prefix_sharing"].items():
        yield f"| {sharing} | {_run_cells(run)} |"
    if "pairs_per_second_gain" in values:
        yield ""
        yield f"Pairs per second, shared over not shared: {values['pairs_per_second_gain']:.2f}."


def _run_cells(run: dict[str, Any]) -> str:
    """Of a run that was timed, by `RUN_COLUMNS`."""
    seconds = ", ".join(f"{run['seconds_per_step'][key]:.3g}" for key in ("median", "least", "most"))
    peaks = ", ".join(f"{peak / MIB:.0f}" for peak in run["peak_bytes_of_ranks"])
    speed = f"{run['tokens_per_second']:.0f} | {run['pairs_per_second']:.3g} | {_useful(run)}"
    return f"{run['num_parameters']:,} | {run['kernel']} | {speed} | {seconds} | {run['steps']} | {peaks}"


def _useful(run: dict[str, Any]) -> str:
    return f"{run['useful_tflops']:.3g} | {_share(run['share_of_ceiling'])}"


def _share(share: float | None) -> str:
    """Nothing where no ceiling was measured."""
    return "" if share is None else f"{share:.1%}"


def _variants(values: dict[str, Any]) -> Iterator[str]:
    yield "As the run with prompts shared of the part throughput, but for what the name says."
    yield ""
    yield f"| variant | status | tokens at once | {RUN_COLUMNS} | why |"
    yield "|---" * (4 + RUN_COLUMNS.count("|") + 1) + "|"
    for run in values["runs"]:
        cells = _run_cells(run) if run["status"] == "ok" else " | " * RUN_COLUMNS.count("|")
        about = f"{run['variant']} | {run['status']} | {run['max_tokens']}"
        yield f"| {about} | {cells} | {_cell(run.get('reason', ''))} |"


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
    yield "| bytes | all-reduce s | GB/s | of a copy | all-gather s | GB/s | of a copy |"
    yield "|---|---|---|---|---|---|---|"
    for line in values["sizes"]:
        cells = []
        for name in ("all_reduce", "all_gather"):
            cells += [f"{line[f'{name}_seconds']:.2e}", f"{line[f'{name}_gb_per_second']:.3g}"]
            cells += [_share(line[f"{name}_share_of_copy"])]
        yield f"| {line['bytes']} | {' | '.join(cells)} |"


def _profile(values: dict[str, Any]) -> Iterator[str]:
    yield f"Step {values['step']} of a run with prompts shared, rank {values['rank']}: {values['step_seconds']:.3g} s"
    yield f"(slower than others, for it is traced). {values['trace']} opens in a browser that shows chrome traces."
    exchanges = values["collectives"]
    yield f"Collectives: {exchanges['calls']} calls, {exchanges['share']:.0%} of the step."
    if values["device"] == "gpu":
        yield f"Nothing was computed beside them for {exchanges['share_with_nothing_beside']:.0%} of the step."
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
    yield "| | pairs in a micro-batch | kernel | pairs/s | useful TFLOP/s | of ceiling | peak MiB of rank 0 |"
    yield "|---|---|---|---|---|---|---|"
    for name, ours in values["ours"].items():
        about = f"ours, {name} | by tokens | {ours['kernel']}"
        yield f"| {about} | {ours['pairs_per_second']:.3g} | {_useful(ours)} | {_mib(ours)} |"
    for run in values["runs"]:
        about = f"TRL {run['version']} | {run['pairs_at_once']} | {run['kernel']}"
        yield f"| {about} | {run['pairs_per_second']:.3g} | {_useful(run)} | {_mib(run)} |"
    yield from (f"| TRL | | | | | | {_cell(reason)} |" for reason in values.get("left_out", []))
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
    "ceilings": _ceilings,
    "kernels": _kernels,
    "throughput": _throughput,
    "memory": _memory,
    "self_check": _self_check,
    "bandwidth": _bandwidth,
    "profile": _profile,
    "trl": _trl,
    "variants": _variants,
}
