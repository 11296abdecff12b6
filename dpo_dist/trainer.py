"""The algorithm: one optimizer step of DPO, read top to bottom.

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290) raises the likelihood of chosen completions
relative to rejected ones, measured against a frozen reference. `train` is the paper; what a run writes down about
itself stands below it.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_dist.batch import RankWork
from dpo_dist.checkpoint import CheckpointStore, RunState, Weights
from dpo_dist.config import RunConfig
from dpo_dist.distributed import Ranks, StopRequest, broadcast_json, sum_over_ranks
from dpo_dist.engine import TrainingEngine
from dpo_dist.errors import StorageError
from dpo_dist.evaluation import evaluate
from dpo_dist.health import Health, accuracy_gap, judge_evaluation, judge_step, restored
from dpo_dist.losses import Objective, mean_loss
from dpo_dist.matching import matched
from dpo_dist.metrics import (
    LOGGED_STATISTICS,
    SUMS,
    MetricsFile,
    Window,
    loss_of,
    padded_tokens,
    require_finite,
    step_sums,
)
from dpo_dist.optim import learning_rate_at
from dpo_dist.packing import Packer, StepPlan, sizes_of
from dpo_dist.reference import Reference
from dpo_dist.sampler import Sampler
from dpo_dist.selfcheck import Proof, check_first_loss
from dpo_dist.tokenization import TokenizedDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything a run consists of, built before it starts."""

    config: RunConfig
    ranks: Ranks
    dataset: TokenizedDataset
    evaluation_sets: Mapping[str, TokenizedDataset]
    sampler: Sampler
    packer: Packer
    policy: TrainingEngine
    reference: Reference
    reference_identity: str
    loss: Objective
    num_steps: int
    metrics_file: MetricsFile
    store: CheckpointStore
    weights: Weights
    write_assets: Callable[[Path], None]  # what a checkpoint holds besides shards and state, to be exported alone
    report: Callable[[Mapping[str, Any]], None]  # shows a written line to the user
    after_update: Callable[[int], object]  # what follows the policy: a reference that is synchronised with it
    stop: StopRequest
    proof: Proof | None  # None where train.self_check is off

    def plan(self, step: int) -> StepPlan:
        """The plan of a global step; every rank computes the same one."""
        rows = self.sampler.examples_of(step)
        return self.packer.plan(step, rows, sizes_of(self.dataset, rows))

    def statistics_of(self, step: int) -> tuple[str, ...]:
        """What global step `step` asks the head for beside log-probabilities: most of it where a line is written."""
        return self.loss.statistics + (LOGGED_STATISTICS if self.is_logged(step + 1) else ())

    def is_logged(self, step: int) -> bool:
        """Whether a line is written after update `step`."""
        return step % self.config.log.logging_steps == 0 or step == self.num_steps


@dataclass
class Progress:
    """Where a run stands; what changes from step to step besides weights and optimizer."""

    step: int = 0  # updates completed
    num_tokens: int = 0  # tokens the policy has processed, over the whole run
    pairs_seen: int = 0
    window: Window = field(default_factory=Window)
    health: Health = field(default_factory=Health)
    window_started: float = field(default_factory=time.perf_counter)
    stopped: bool = False  # somebody asked for it, and all ranks agreed

    def is_over(self, num_steps: int) -> bool:
        """Whether no step follows: all are made, or the run ends early, or it was asked to stop."""
        return self.step >= num_steps or bool(self.health.ended) or self.stopped


def train(run: Run, progress: Progress) -> None:
    """Minimise the preference loss from where `progress` stands until the run is over."""
    beta, device = run.config.loss.beta, run.ranks.device
    while not progress.is_over(run.num_steps):
        plan = run.plan(progress.step)
        work = RankWork(plan, run.ranks.rank, run.dataset, run.packer.share_prompts, run.config.loss.ld_alpha)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)

        # 1. How likely is every completion under the frozen reference?  (no gradient, large bins)
        reference_logps = run.reference.completion_logps(work)

        # Where a loss compares the step's pairs with each other: what each is matched with.  (no gradient; AOT only)
        batches = matched(run.loss, run.policy, plan, work.micro_batches(), reference_logps)

        for batch in run.policy.accumulate(batches):
            # 2. How likely is it under the policy?
            tokens = run.policy.token_scores(batch, run.statistics_of(progress.step))
            logps = batch.completion_sums(tokens.logps_M)

            # 3. Log-ratios: how far the policy has moved from the reference on each completion.
            logratios = logps - reference_logps[batch.completion_index_C]

            # 4. The loss prefers moving towards the chosen completion over the rejected one.  (eq. 7)
            losses = run.loss(batch, logps, logratios, tokens)

            # 5. Divide by the step's total weight: the gradient cannot depend on how the step is split.
            run.policy.backward(mean_loss(losses, plan.weights))
            sums += step_sums(batch, logps, logratios, losses, beta, tokens)

        # 6. Update theta; then, once in a while: log, evaluate, save.
        learning_rate = learning_rate_at(progress.step, run.config.train, run.num_steps)
        norm = run.policy.step(learning_rate)
        # The one device-to-host copy of a step; every rank learns here whether any rank was asked to stop.
        *totals, grad_norm, stop_requests = sum_over_ranks(torch.cat([sums, norm, run.stop.as_tensor(device)])).tolist()
        progress.stopped = stop_requests > 0
        _finish_step(run, progress, plan, dict(zip(SUMS, totals, strict=True)), grad_norm, learning_rate)


def _finish_step(
    run: Run, progress: Progress, plan: StepPlan, totals: dict[str, float], grad_norm: float, learning_rate: float
) -> None:
    """Count the step, and do what is due after it. Every rank must get here."""
    progress.step += 1
    run.after_update(progress.step)
    step, health = progress.step, progress.health
    step_loss = loss_of(totals)
    finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
    sources = [] if finite else [run.dataset.source_of(row) for row in plan.examples]
    require_finite(step, {"loss": step_loss, "grad_norm": grad_norm}, sources)
    if step == 1 and run.proof is not None:
        verdict = check_first_loss(step_loss, run.loss, run.proof)
        if run.ranks.is_first:
            logger.info(verdict)
    progress.num_tokens += int(totals["tokens_processed"])
    progress.pairs_seen += int(totals["num_pairs"])
    rows = [length for size in sizes_of(run.dataset, plan.examples) for length in size.longest_rows]
    progress.window.add({**totals, "tokens_padded": padded_tokens(rows)} if rows else totals)

    _say(run, judge_step(health, totals, run.config))

    if run.is_logged(step) or health.ended:
        _write_train_line(run, progress, grad_norm, learning_rate)
    if evaluation_is_due(run, step) and not progress.stopped:  # who asks for a stop may not wait; `restore` makes up
        evaluate_all(run, progress)
    save_steps = run.config.checkpoint.save_steps
    if progress.is_over(run.num_steps) or health.best_step == step or (save_steps and step % save_steps == 0):
        save(run, progress)


def _write_train_line(run: Run, progress: Progress, grad_norm: float, learning_rate: float) -> None:
    """One line of means over the interval; the first rank writes."""
    now = time.perf_counter()
    seconds, progress.window_started = now - progress.window_started, now
    window, progress.window = progress.window, Window()
    counts = window.counts()
    line = {
        "step": progress.step,
        "epoch": run.sampler.examples_seen(progress.step) / run.sampler.num_examples,
        **window.means(run.config.has_reference),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": progress.num_tokens,
        **counts,
        **({"pairs_per_second": window.sums["num_pairs"] / seconds} if window.sums["num_pairs"] else {}),
        "tokens_per_second": counts["tokens_processed"] / seconds,
        "time/step": seconds / window.num_steps,
        "memory/peak_gib": peak_memory_gib(run.ranks.device),
    }
    if run.ranks.is_first:
        run.metrics_file.write(line)
        run.report(line)


def evaluation_is_due(run: Run, step: int) -> bool:
    """Whether the held-out sets are evaluated after update `step`."""
    eval_steps = run.config.evaluation.eval_steps
    return eval_steps > 0 and step > 0 and (step % eval_steps == 0 or step == run.num_steps)


def evaluate_all(run: Run, progress: Progress) -> None:
    """Evaluate every held-out set, each under its own name. Every rank must call it."""
    started, found = time.perf_counter(), {}
    for name, dataset in run.evaluation_sets.items():
        values = evaluate(
            run.policy, run.reference, dataset, run.packer, run.loss, run.config.loss.beta, run.config.has_reference
        )
        if (gap := accuracy_gap(progress.health, values)) is not None:
            values["accuracy_gap"] = gap
        found[name] = values
        require_finite(progress.step, {f"{key} of {name}": value for key, value in values.items()})
        line = {"step": progress.step, "split": "evaluation", "dataset": name, **values}
        if run.ranks.is_first:
            run.metrics_file.write(line)
            run.report(line)
    _say(run, judge_evaluation(progress.health, progress.step, found, run.config))
    progress.window_started += time.perf_counter() - started  # evaluation is not training time


def _say(run: Run, messages: list[str]) -> None:
    for message in messages if run.ranks.is_first else ():
        logger.warning(message)


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint from which the run continues exactly. Every rank must call it."""
    started = time.perf_counter()
    state = RunState(
        step=progress.step,
        examples_seen=run.sampler.examples_seen(progress.step),
        seed=run.config.train.seed,
        num_tokens=progress.num_tokens,
        pairs_seen=progress.pairs_seen,
        metrics_window=progress.window.to_json(),
        health=progress.health.to_json(),
        reference_identity=run.reference_identity,
        data_fingerprint=run.dataset.fingerprint,
        world_size=run.ranks.world_size,
        config=run.config.model_dump(mode="json"),
    )
    try:
        folder = run.store.save(state, run.weights.write, run.write_assets, run.metrics_file.sync)
    except StorageError as error:
        if progress.is_over(run.num_steps):
            raise
        if progress.health.best_step == progress.step:
            progress.health.best_step = 0  # there is no such checkpoint
        if run.ranks.is_first:
            logger.error("%s; training goes on, and the next checkpoint is tried when it is due", error)
        return
    progress.window_started += time.perf_counter() - started
    if run.ranks.is_first:
        logger.info("saved %s", folder)


def restore(run: Run, folder: Path) -> Progress:
    """Put weights, optimizer and random generators back to where a verified checkpoint of this run left them."""
    state = run.store.load_state(folder)
    run.weights.read(folder)
    run.store.restore_rng(folder)
    if run.ranks.is_first:
        run.metrics_file.keep_until(state.step, folder, evaluated=state.health.get("evaluated") == state.step)
        logger.info("resuming after step %d (%d examples) from %s", state.step, state.examples_seen, folder)
    window, health = Window.from_json(state.metrics_window), restored(state.health, state.config, run.config)
    progress = Progress(state.step, state.num_tokens, state.pairs_seen, window, health)
    if evaluation_is_due(run, state.step) and health.evaluated != state.step:
        # Only the first rank reads the file: it has just dropped a line that a kill may have cut short.
        found = broadcast_json(run.metrics_file.evaluations(state.step) if run.ranks.is_first else None)
        if found.keys() == run.evaluation_sets.keys():
            _say(run, judge_evaluation(health, state.step, found, run.config))
        else:
            evaluate_all(run, progress)
    return progress


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held at once: the device's, or on CPU the process's resident set, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
