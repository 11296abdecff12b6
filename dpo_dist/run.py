"""What a run consists of, where it stands, and how that is saved and restored."""

import functools
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_dist.baseline import Baseline
from dpo_dist.batch import RankWork
from dpo_dist.checkpoint import CheckpointStore, RunState, Weights
from dpo_dist.config import RunConfig
from dpo_dist.distributed import Ranks, StopRequest, raise_together
from dpo_dist.engine import TrainingEngine
from dpo_dist.errors import NumericsError, StorageError
from dpo_dist.health import Health, restored
from dpo_dist.losses import Objective
from dpo_dist.metrics import LOGGED_STATISTICS, MetricsFile, RewardMean, Window, sum_names
from dpo_dist.model import Compilations
from dpo_dist.pace import Pace
from dpo_dist.packing import Packer, StepPlan, sizes_of
from dpo_dist.reference import CachedReference, NoReference, Reference
from dpo_dist.sampler import Sampler
from dpo_dist.selfcheck import Proof
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
    pace: Pace
    more_room: str  # what to change where memory runs out; empty: the general advice
    compilations: Compilations | None

    @property
    def baseline(self) -> Baseline:
        """What rewards of single completions are held against."""
        return Baseline(self.loss, self.policy, self.reference, self.packer, self.config.data.max_length)

    def plan(self, step: int) -> StepPlan:
        """The plan of a global step; every rank computes the same one."""
        rows = self.sampler.examples_of(step)
        return self.packer.plan(step, rows, sizes_of(self.dataset, rows))

    def share(self, step: int) -> tuple[StepPlan, RankWork]:
        """The plan of a global step, and this rank's part of it with its micro-batches, from any thread.

        On a GPU they lie in pinned memory.
        """
        device = self.ranks.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins at the first one, where pinning might make a context
        plan = self.plan(step)
        work = RankWork(plan, self.ranks.rank, self.dataset, self.packer.share_prompts, self.config.loss.ld_alpha)
        reads_bins = not isinstance(self.reference, CachedReference | NoReference)
        work.make(reads_bins and not self.config.reference.per_microbatch, pinned=device.type == "cuda")
        return plan, work

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of what a step adds up."""
        return sum_names(len(self.config.data.train))

    def statistics_of(self, step: int) -> tuple[str, ...]:
        """What global step `step` asks the head for beside log-probabilities: most of it where a line is written."""
        return self.loss.statistics + (LOGGED_STATISTICS if self.is_logged(step + 1) else ())

    def sources_of(self, plan: StepPlan) -> list[str]:
        """Where a step's examples come from, `file:line` each."""
        return [self.dataset.source_of(row) for row in plan.examples]

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
    rewards: RewardMean = field(default_factory=RewardMean)
    window_started: float = field(default_factory=time.perf_counter)
    saving: int = 0  # the step of the checkpoint that was begun last
    stopped: bool = False  # somebody asked for it, and all ranks agreed

    def is_over(self, num_steps: int) -> bool:
        """Whether no step follows: all are made, or the run ends early, or it was asked to stop."""
        return self.step >= num_steps or bool(self.health.ended) or self.stopped


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint from which the run continues exactly. Every rank must call it.

    Raises:
        NumericsError: a weight is not finite.
        StorageError: the last one of a run cannot be written.
    """
    complete_save(run, progress, goes_on=not progress.is_over(run.num_steps))
    started = time.perf_counter()
    require_sound(run, progress.step)
    progress.saving = progress.step
    state = RunState(
        step=progress.step,
        examples_seen=run.sampler.examples_seen(progress.step),
        seed=run.config.train.seed,
        num_tokens=progress.num_tokens,
        pairs_seen=progress.pairs_seen,
        metrics_window=progress.window.to_json(),
        health=progress.health.to_json(),
        rewards=progress.rewards.to_json(),
        reference_identity=run.reference_identity,
        data_fingerprint=run.dataset.fingerprint,
        world_size=run.ranks.world_size,
        config=run.config.model_dump(mode="json"),
    )
    # The last one is waited for: nothing follows that could give it its name.
    wanted = run.config.checkpoint.async_save and run.policy.allocation is None
    in_background = wanted and not progress.is_over(run.num_steps)
    with _going_on(run, progress, progress.step):
        write = functools.partial(run.weights.write, copies=in_background)
        folder = run.store.save(state, write, run.write_assets, run.metrics_file.sync, in_background)
        _report(run, folder)
    progress.window_started += time.perf_counter() - started


def complete_save(run: Run, progress: Progress, goes_on: bool = True) -> None:
    """Wait for the checkpoint that is being written, if there is one, and give it its name. Every rank must call it.

    Args:
        run: its store knows of it.
        progress: of the run.
        goes_on: whether a step follows; for the message where it cannot be written.
    """
    started = time.perf_counter()
    with _going_on(run, progress, progress.saving, goes_on):
        _report(run, run.store.finish())
    progress.window_started += time.perf_counter() - started


def _report(run: Run, folder: Path | None) -> None:
    if run.ranks.is_first and folder is not None:
        logger.info("saved %s", folder)


@contextmanager
def _going_on(run: Run, progress: Progress, step: int, goes_on: bool = True) -> Iterator[None]:
    """A checkpoint that cannot be written ends a run only where no other one follows."""
    try:
        yield
    except StorageError as error:
        if progress.is_over(run.num_steps) and step == progress.step:
            raise
        if progress.health.best_step == step:
            progress.health.best_step = 0  # there is no such checkpoint
        if run.ranks.is_first:
            then = "; training goes on, and the next checkpoint is tried when it is due" if goes_on else ""
            logger.error("%s%s", error, then)


def require_sound(run: Run, step: int) -> None:
    """Nothing is made of weights that are not finite, neither a checkpoint nor a model. Every rank must call it.

    Raises:
        NumericsError: on every rank, naming a parameter.
    """
    broken = run.policy.broken_parameter()
    text = (
        f"after step {step} {broken} is not finite: the model is ruined, and neither saved nor exported; what was "
        "saved before is intact. Lower train.learning_rate"
    )
    raise_together(NumericsError(text) if broken else None)


def restore(run: Run, folder: Path) -> Progress:
    """Put weights, optimizer and random generators back to where a verified checkpoint of this run left them."""
    state = run.store.load_state(folder)
    run.weights.read(folder)
    run.store.restore_rng(folder)
    if run.ranks.is_first:
        run.metrics_file.keep_until(state.step, folder, evaluated=state.health.get("evaluated") == state.step)
        logger.info("resuming after step %d (%d examples) from %s", state.step, state.examples_seen, folder)
    window, health = Window.from_json(state.metrics_window), restored(state.health, state.config, run.config)
    rewards = RewardMean.from_json(state.rewards)
    return Progress(state.step, state.num_tokens, state.pairs_seen, window, health, rewards)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held at once: the device's, or on CPU the process's resident set, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
