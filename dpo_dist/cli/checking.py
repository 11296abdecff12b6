"""`dpo-dist check`: all that can be known before training, in words and numbers."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dpo_dist.checkpoint import CheckpointStore
from dpo_dist.cli.data_quality import describe_leaks, describe_quality
from dpo_dist.cli.describe import counted, describe_adapter
from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.reading import tokenizer_if_any
from dpo_dist.cli.remarks import remarks
from dpo_dist.cli.requirements import output_in_use, who_trains
from dpo_dist.cli.resuming import find_start
from dpo_dist.cli.sources import Choice, find_source
from dpo_dist.distributed import Ranks
from dpo_dist.metrics import padded_tokens
from dpo_dist.packing import sizes_of
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample, describe_notes
from dpo_dist.tokenization.turns import number_learned

_MAX_SHOWN = 4  # completions of the sample


def print_check(prepared: Prepared, cache_dir: Path, world_size: int) -> None:
    """Print the report; a mistake raises as it would in training."""
    config = prepared.config
    # As one of the run's ranks would see it; nothing is changed, for the run may be training at this moment.
    ranks = Ranks(0, world_size, 0, torch.device("cpu"))
    start = find_start(prepared, CheckpointStore(Path(config.train.output_dir), ranks), look_only=True)
    choice = find_source(prepared, ranks, cache_dir)
    if choice.cache is not None:
        choice.cache.require_writable()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    _print_model(console, prepared, choice)
    for name, dataset in prepared.datasets.items():
        _print_data(console, name, dataset)
    for leak in describe_leaks(prepared.datasets):
        console.print(f"note: {leak}")
    _print_sample(console, prepared)
    _print_first_step(console, prepared, world_size)
    if start.text:
        console.print(start.text)
    for change in start.changes:
        console.print(f"note: {change}")
    in_use = output_in_use(config)
    trainer = None if in_use else who_trains(Path(config.train.output_dir))
    if trainer is not None:
        console.print(f"note: another run trains in {config.train.output_dir} ({trainer}); wait until it has ended")
    if in_use:
        console.print(f"note: {in_use}")
    console.print(f"the configuration can be trained{', in another folder' if in_use else ''}", style="bold")


def _print_model(console: Console, prepared: Prepared, choice: Choice) -> None:
    kernel, kernel_reason = prepared.attention
    shared, sharing_reason = prepared.sharing
    reference = "the policy's starting weights" if prepared.same_base else str(prepared.reference_folder)
    console.print(f"model              {prepared.model_folder} ({prepared.model_config.model_type})")
    console.print(f"reference          {reference if choice.source != 'none' else 'none'}")
    console.print(f"reference source   {choice.text}")
    if prepared.config.adapter.is_used:
        console.print(f"adapter            {describe_adapter(prepared)}")
    console.print(f"dtype              {prepared.config.model.dtype}")
    console.print(f"attention kernel   {kernel}: {kernel_reason}")
    tried = "packed log-probabilities of a small random model equal those of its own forward"
    if not any(model.tried.untried for model in prepared.architectures):
        console.print(f"architecture       {tried}")
    console.print(f"prefix sharing     {'on' if shared else 'off'}: {sharing_reason}")
    disabled = prepared.model_config.disabled_dropout
    console.print(f"dropout            off{f' (the model has {disabled})' if disabled else ''}")
    stage = prepared.deepspeed.get("zero_optimization", {}).get("stage", 0)
    console.print(f"ZeRO stage         {stage} ({prepared.config.parallel.deepspeed})")


def _print_data(console: Console, name: str, dataset: TokenizedDataset) -> None:
    table = Table(title=f"{name}: {counted(len(dataset), 'example')}, tokens", title_justify="left")
    stats = dataset.stats()
    columns = list(next(iter(stats.values())))
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for kind, values in stats.items():
        table.add_row(kind, *(f"{values[column]:.0f}" for column in columns))
    console.print(table)
    for line in describe_quality(dataset):
        console.print(line)
    for reason, count in dataset.bad_rows.items():
        console.print(f"rows left out: {count} x {reason}")
    for note in describe_notes(dataset.notes, len(dataset)):
        console.print(f"note: {note}")
    if dataset.ignored_columns:
        console.print(f"columns ignored: {', '.join(dataset.ignored_columns)}")


def _print_sample(console: Console, prepared: Prepared) -> None:
    row = prepared.sampler.examples_of(0)[0]
    example = prepared.dataset[row]
    sample = prepared.dataset.sample(row, tokenizer_if_any(prepared.tokenizer))
    console.print(f"first example of the first step: {sample.source}")
    console.print(f"prompt ({len(example.prompt_ids)} tokens): {sample.prompt!r}")
    for kind, index in _shown_completions(example):
        ids = example.completion_ids[index]
        learned = number_learned(ids)
        of_them = "" if learned == len(ids) else f", {learned} of them learned"
        console.print(f"{kind} ({len(ids)} tokens{of_them}): {sample.completions[index]!r}")


def _shown_completions(example: TokenizedExample) -> list[tuple[str, int]]:
    """What to call the completions of an example, with the place of each; of many the best, in order of preference."""
    if example.ratings:
        return [("good completion" if good else "bad completion", index) for index, good in enumerate(example.ratings)]
    if not example.pairs:
        return [("completion", index) for index in range(len(example.completion_ids))]
    if len(example.completion_ids) == 2:
        return [("chosen", example.pairs[0].chosen), ("rejected", example.pairs[0].rejected)]
    # The longest chain of better ones above each; merged rows may contradict each other, and a circle has no end.
    above = [0] * len(example.completion_ids)
    for _ in above:
        for pair in example.pairs:
            above[pair.rejected] = min(len(above), max(above[pair.rejected], above[pair.chosen] + 1))
    order = sorted(range(len(above)), key=above.__getitem__)[:_MAX_SHOWN]
    return [(f"completion better than {_times(example, index)}", index) for index in order]


def _times(example: TokenizedExample, index: int) -> str:
    better = sum(pair.chosen == index for pair in example.pairs)
    return counted(better, "other")


def _print_first_step(console: Console, prepared: Prepared, world_size: int) -> None:
    plan = prepared.first_plan(world_size)
    sizes = sizes_of(prepared.dataset, plan.examples)
    tokens = [size.input_tokens(prepared.sharing[0]) for size in sizes]
    unshared = sum(size.unshared_tokens for size in sizes)
    rows = [length for size in sizes for length in size.longest_rows]
    padded = f"; padded as TRL does {padded_tokens(rows)}" if rows else ""
    alone = "completion" if plan.rated_weight else "demonstration"
    of_pairs, own = (f", {counted(plan.num_pairs, 'pair')}", "pair") if rows else ("", alone)
    counts = f"{counted(len(sizes), 'example')}{of_pairs}"
    console.print(f"first step on {counted(world_size, 'rank')}: {counts}")
    for rank, bins in enumerate(plan.micro_batches):
        loads = [sum(tokens[i] for i in one) for one in bins]
        forwards = counted(len(plan.reference_bins[rank]), "forward")
        console.print(f"  rank {rank}: micro-batches of {loads} tokens; reference in {forwards}")
    console.print(f"  {sum(tokens)} tokens processed; every {own} on its own {unshared}{padded}")
    console.print(
        f"steps              {prepared.num_steps}, {prepared.sampler.steps_per_epoch} per epoch of "
        f"{counted(len(prepared.dataset), 'example')}"
    )
    for remark in remarks(prepared, plan):
        console.print(f"note: {remark}")
