"""The algorithm: one optimizer step of DPO, read top to bottom.

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290) raises the likelihood of chosen completions
relative to rejected ones, measured against a frozen reference. `train` is the paper; what a run writes down about
itself stands below it.
"""

import logging
import math
import time

import torch

from dpo_dist.ahead import Ahead
from dpo_dist.distributed import Stopped, broadcast_json, sum_over_ranks
from dpo_dist.errors import NumericsError
from dpo_dist.evaluation import evaluate
from dpo_dist.health import accuracy_gap, judge_evaluation, judge_not_finite, judge_step
from dpo_dist.losses import mean_loss
from dpo_dist.matching import matched
from dpo_dist.metrics import Window, loss_of, not_finite, padded_tokens, step_sums
from dpo_dist.optim import learning_rate_at
from dpo_dist.packing import StepPlan, sizes_of
from dpo_dist.phases import reach
from dpo_dist.run import Progress, Run, complete_save, peak_memory_gib, save
from dpo_dist.selfcheck import check_first_loss

logger = logging.getLogger(__name__)


def train(run: Run, progress: Progress) -> None:
    """Minimise the preference loss from where `progress` stands until the run is over."""
    beta, device = run.config.loss.beta, run.ranks.device
    ahead = Ahead(run.share, run.num_steps)
    while not progress.is_over(run.num_steps):
        reach("step", progress.step + 1)
        plan, work = ahead.of(progress.step)
        sums = torch.zeros(len(run.sum_names), dtype=torch.float64, device=device)

        # 1. How likely is every completion under the frozen reference?  (no gradient, large bins)
        reference_logps = run.reference.completion_logps(work)

        # Where a loss compares the step's pairs with each other: what each is matched with.  (no gradient; AOT only)
        batches = matched(run.loss, run.policy, plan, work.micro_batches(), reference_logps)

        # Where a loss is of single completions: what their rewards are held against.  (no gradient; KTO and BCO only)
        batches = run.baseline.given_to(batches, plan, work, reference_logps, progress.rewards, learns=True)

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
            ahead.begin(progress.step + 1)
            sums += step_sums(batch, logps, logratios, losses, beta, tokens, len(run.config.data.train))

        # 6. Update theta; then, once in a while: log, evaluate, save.
        learning_rate = learning_rate_at(progress.step, run.config.train, run.num_steps)
        norm = run.policy.step(learning_rate)
        reach("agree")
        # The one device-to-host copy of a step; every rank learns here whether any rank was asked to stop.
        *totals, grad_norm, stop_requests, written = sum_over_ranks(
            torch.cat([sums, norm, run.stop.as_tensor(device), run.store.as_tensor(device)])
        ).tolist()
        if written == run.ranks.world_size:
            complete_save(run, progress)
        progress.stopped = stop_requests > 0
        _finish_step(run, progress, plan, dict(zip(run.sum_names, totals, strict=True)), grad_norm, learning_rate)


def _finish_step(
    run: Run, progress: Progress, plan: StepPlan, totals: dict[str, float], grad_norm: float, learning_rate: float
) -> None:
    """Count the step, and do what is due after it. Every rank must get here."""
    reach("numbers")
    progress.step += 1
    run.after_update(progress.step)
    step, health = progress.step, progress.health
    _take_in(run, progress, plan, totals, grad_norm)

    if run.ranks.is_first and run.compilations is not None and (text := run.compilations.news(step)):
        logger.info(text)
    if run.is_logged(step) or health.ended:
        _write_train_line(run, progress, grad_norm, learning_rate)
    if evaluation_is_due(run, step) and not progress.stopped:  # who asks for a stop may not wait; `restore` makes up
        evaluate_all(run, progress)
    save_steps = run.config.checkpoint.save_steps
    if progress.is_over(run.num_steps) or health.best_step == step or (save_steps and step % save_steps == 0):
        save(run, progress)


def _take_in(run: Run, progress: Progress, plan: StepPlan, totals: dict[str, float], grad_norm: float) -> None:
    """Judge the step's numbers, and add them to those of the interval."""
    sizes = sizes_of(run.dataset, plan.examples)
    run.pace.add(plan, sizes, int(totals["num_pairs"]), int(totals["tokens_processed"]))
    step_loss = loss_of(totals)
    if text := not_finite(progress.step, {"loss": step_loss, "grad_norm": grad_norm}, lambda: run.sources_of(plan)):
        _say(run, [judge_not_finite(progress.health, text, run.config)])
        progress.window.num_skipped += 1
        return
    if progress.num_tokens == 0 and run.proof is not None:
        verdict = check_first_loss(step_loss, run.loss, run.proof)
        if run.ranks.is_first:
            logger.info(verdict)
    progress.num_tokens += int(totals["tokens_processed"])
    progress.pairs_seen += int(totals["num_pairs"])
    rows = [length for size in sizes for length in size.longest_rows]
    progress.window.add({**totals, "tokens_padded": padded_tokens(rows)} if rows else totals)
    _say(run, judge_step(progress.health, totals, run.config))


def _write_train_line(run: Run, progress: Progress, grad_norm: float, learning_rate: float) -> None:
    """One line of means over the interval; the first rank writes."""
    now = time.perf_counter()
    seconds, progress.window_started = now - progress.window_started, now
    window, progress.window = progress.window, Window()
    line = {
        "step": progress.step,
        "epoch": run.sampler.examples_seen(progress.step) / run.sampler.num_examples,
        **window.means(run.config.has_reference),
        **window.of_entries(run.config.data.train_names),
        **({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}),
        "learning_rate": learning_rate,
        "num_tokens": progress.num_tokens,
        **window.counts(),
        **run.pace.line(seconds),
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
    """Evaluate every held-out set, each under its own name. Every rank must call it.

    A request to stop ends it; the run that goes on then evaluates anew (`catch_up`).
    """
    started = time.perf_counter()
    try:
        _say(run, judge_evaluation(progress.health, progress.step, _evaluated(run, progress), run.config))
    except Stopped:
        progress.stopped = True
    progress.window_started += time.perf_counter() - started  # evaluation is not training time


def _evaluated(run: Run, progress: Progress) -> dict[str, dict[str, float]]:
    """The values of every held-out set, which are written down."""
    found, config = {}, run.config
    reach("evaluation")
    for name, dataset in run.evaluation_sets.items():
        values = evaluate(run.baseline, dataset, progress.rewards, config.loss.beta, config.has_reference, run.stop)
        if (gap := accuracy_gap(progress.health, values)) is not None:
            values["accuracy_gap"] = gap
        found[name] = values
        if text := not_finite(progress.step, {f"{key} of {name}": value for key, value in values.items()}):
            raise NumericsError(f"{text}; what was saved before is intact. Lower train.learning_rate")
        line = {"step": progress.step, "split": "evaluation", "dataset": name, **values}
        if run.ranks.is_first:
            run.metrics_file.write(line)
            run.report(line)
    return found


def catch_up(run: Run, progress: Progress) -> None:
    """Evaluate where a resumed run was stopped before it did. Every rank must call it."""
    step, health = progress.step, progress.health
    if not evaluation_is_due(run, step) or health.evaluated == step:
        return
    # Only the first rank reads the file: it has just dropped a line that a kill may have cut short.
    found = broadcast_json(run.metrics_file.evaluations(step) if run.ranks.is_first else None)
    if found.keys() == run.evaluation_sets.keys():
        _say(run, judge_evaluation(health, step, found, run.config))
    else:
        evaluate_all(run, progress)


def _say(run: Run, messages: list[str]) -> None:
    for message in messages if run.ranks.is_first else ():
        logger.warning(message)
