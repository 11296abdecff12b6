"""A report as a page that a person reads."""

from collections.abc import Iterator
from typing import Any

from benchmarks.trl.chart import Bar, chart
from benchmarks.trl.judging import LOSS_BOUND, RELATIVE_BOUNDS
from benchmarks.trl.variants import Variant

SAME = (
    "weights; the same pairs, as token ids, in the same steps; float32; one process with the same number of threads; "
    "sigmoid loss and beta; AdamW's learning rate (constant), betas and epsilon, no decay, clipping; the reference "
    "computed in every step; activations recomputed or kept, as the heading says; one log line for each step; "
    "nothing is saved"
)
NOT_SAME = (
    "TRL computes every prompt once for each completion and pads all pairs of a step to the longest, in one "
    "micro-batch; we pack tokens without padding, at most `max_tokens` in a micro-batch. Ours runs on DeepSpeed, "
    "TRL on torch alone, each with its own AdamW. Both log more than the loss, each what it logs by default"
)
KIND = {
    True: "Activations recomputed in both",
    False: "Activations kept in both",
    None: "Activations as each does by default: ours keeps what fits, TRL recomputes",
}
WORD = {True: "recomputed", False: "kept", None: "default"}


def page(report: dict[str, Any]) -> str:
    """Markdown; the charts are files beside it, by the names of `charts`."""
    lines = [f"# {report['title']}", "", *_about(report), "", "## The same work", "", *_equality(report)]
    for part in report["parts"]:
        lines += ["", f"## {KIND[part['recompute']]}", "", *_failed(part)]
        if part["faults"]:
            lines += ["Not the same work, so nothing is compared:", "", *(f"- {fault}" for fault in part["faults"])]
        else:
            lines += [*_table(part), "", *_ratios(report, part), "", f"![pairs per second]({chart_name(report, part)})"]
    lines += ["", "## What is what", "", *_meanings(report)]
    return "\n".join(lines) + "\n"


def charts(report: dict[str, Any]) -> dict[str, str]:
    """SVG files by name: pairs per second of every variant, for each part that may be compared."""
    return {chart_name(report, part): _chart(report, part) for part in report["parts"] if not part["faults"]}


def chart_name(report: dict[str, Any], part: dict[str, Any]) -> str:
    """The file of a part's chart."""
    return f"{report['name']}-{_activations(part)}.svg"


def _chart(report: dict[str, Any], part: dict[str, Any]) -> str:
    bars = []
    for name, one in part["summary"].items():
        pace = one["pairs_per_second"]
        bars.append(Bar(name, pace["median"], pace["least"], pace["most"], emphasis=name.startswith("ours")))
    return chart(f"{report['data']['name']}, {KIND[part['recompute']].lower()}", "pairs per second", bars)


def _about(report: dict[str, Any]) -> Iterator[str]:
    settings, data, machine = report["settings"], report["data"], report["machine"]
    changed = " (changed)" if machine["checkout_is_changed"] else ""
    yield f"- {report['date']}, commit {machine['commit']}{changed}: `{report['command']}`"
    yield f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; {machine['system']}"
    yield "- " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    timed = settings["steps"] - settings["warm_up"]
    yield f"- repeats: {settings['repeats']}; each variant in turn in a fresh process of {settings['threads']} threads;"
    yield f"  steps: {settings['steps']}, of them timed: {timed}; {settings['pairs_per_step']} pairs in a step"
    yield f"- ours: `packing.max_tokens={settings['max_tokens']}`, `parallel.deepspeed={settings['deepspeed']}`"
    yield f"- data: {data['name']}, {data['pairs']} timed pairs in {data['examples']} examples; tokens, mean and most:"
    lengths = [f"{key} {data[key]['mean']:.0f}, {data[key]['longest']}" for key in ("prompt", "completion")]
    yield f"  {'; '.join(lengths)}. Tokens to read, each prompt once: {data['tokens']}"
    yield "- the rows are drawn at random; for each token to read TRL's layout has"
    yield f"  {data['padding']:.2f} tokens in these rows, and {data['padding_of_all']:.2f} in all there are"
    yield f"- operations that the timed steps ask for, in closed form: {report['flops'] / 1e12:.2f} TFLOP"
    yield "  (recomputation is not counted)"
    peaks = ", ".join(f"{value:.0f}" for value in report["peaks"])
    yield f"- fastest float32 matrix product, before and after every repeat: {peaks} GFLOP/s; the largest counts"
    yield f"- the same in all: {SAME}"
    yield f"- not the same: {NOT_SAME}"


def _equality(report: dict[str, Any]) -> Iterator[str]:
    bounds = " | ".join(f"{bound:.0e}" for bound in (LOSS_BOUND, *RELATIVE_BOUNDS.values()))
    yield "Largest distance from ours over all steps and repeats, warm-up included: of the loss the difference, of the"
    yield "rest relative. A variant in the order of lengths is compared with ours in that order."
    yield ""
    yield f"| variant | activations | loss | {' | '.join(RELATIVE_BOUNDS)} |"
    yield "|---" * (3 + len(RELATIVE_BOUNDS)) + "|"
    for part in report["parts"]:
        for name, distance in part["distances"].items():
            cells = " | ".join(f"{distance[key]:.1e}" for key in ("loss", *RELATIVE_BOUNDS))
            yield f"| {name} | {_activations(part)} | {cells} |"
    yield f"| at most | | {bounds} |"


def _failed(part: dict[str, Any]) -> Iterator[str]:
    for name, reasons in part["failed"].items():
        yield f"- {name} failed, in {len(reasons)} of the repeats: {reasons[0].replace('|', '/')}"
    if part["failed"]:
        yield ""


def _table(part: dict[str, Any]) -> Iterator[str]:
    yield "Medians of the repeats, with the least and the most."
    yield ""
    yield "| variant | pairs/s | tokens processed | peak MiB | useful GFLOP/s | of the peak |"
    yield "|---|---|---|---|---|---|"
    for name, one in part["summary"].items():
        cells = [_spread(one["pairs_per_second"]), f"{one['tokens']}", _spread(one["peak_mib"], ".0f")]
        cells += [_spread(one["gflops"]), f"{one['of_peak']:.1%}"]
        yield f"| {name} | {' | '.join(cells)} |"


def _ratios(report: dict[str, Any], part: dict[str, Any]) -> Iterator[str]:
    found = part["ratios"]
    yield "Pairs per second, ours over the variant; the repeats are compared one by one."
    yield ""
    yield "| over | ratio |"
    yield "|---|---|"
    yield from (f"| {name} | {_spread(ratio)} |" for name, ratio in found["over"].items())
    yield ""
    yield from (f"- {line}" for line in headlines(report, part))


def headlines(report: dict[str, Any], part: dict[str, Any]) -> Iterator[str]:
    """The figures that a reader looks for first."""
    found, ours = part["ratios"], part["summary"].get("ours")
    where = f"{report['data']['name']}, {_activations(part)}"
    if found["stock"]:
        yield f"{where}: ours over TRL stock {_spread(found['stock'])}"
    if found["best"]:
        best = found["best"]
        ran = f"{best['of']} TRL variant{'' if best['of'] == 1 else 's'}"
        yield f"{where}: ours over the fastest of {ran} that ran ({best['name']}) {_spread(best)}"
    if found["memory"]:
        yield f"{where}: our peak memory as a share of TRL stock's {_spread(found['memory'])}"
    if ours:
        yield f"{where}: ours does {ours['of_peak']:.1%} of the fastest matrix product, useful operations only"


def _meanings(report: dict[str, Any]) -> Iterator[str]:
    names = dict.fromkeys(name for part in report["parts"] for name in (*part["summary"], *part["failed"]))
    yield from (f"- {name}: {Variant.named(name).meaning}" for name in names)


def _activations(part: dict[str, Any]) -> str:
    return WORD[part["recompute"]]


def _spread(values: dict[str, float], form: str = ".3g") -> str:
    return f"{values['median']:{form}} ({values['least']:{form}} to {values['most']:{form}})"
