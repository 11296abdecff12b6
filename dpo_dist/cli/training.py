"""`dpo-dist train`: build a run, prove it, train it, export it."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from dpo_dist import losses
from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.checkpoint import CheckpointStore, Weights
from dpo_dist.cli.announcing import announce
from dpo_dist.cli.describe import base_model_name, facts
from dpo_dist.cli.ending import advising, give_up
from dpo_dist.cli.pacing import measuring, pace_of
from dpo_dist.cli.prepare import Prepared, prepare_run
from dpo_dist.cli.progress import reporting
from dpo_dist.cli.recomputing import settle_recomputation, wanted_at_loading
from dpo_dist.cli.resuming import Start, find_start
from dpo_dist.cli.room import more_room
from dpo_dist.cli.run_folder import (
    CONFIG_FILE,
    checkpoint_bytes,
    locked,
    record_model,
    require_space,
    start_trackers,
    write_config,
    writing,
)
from dpo_dist.cli.sources import Choice, fill_cache, find_source, reference_engine, reference_of
from dpo_dist.cli.trained_model import asset_writer, write_model
from dpo_dist.config import RunConfig
from dpo_dist.distributed import Ranks, Stopped, StopRequest, end_with_launcher, process_group
from dpo_dist.engine import InferenceEngine, TrainingEngine, adopt_process_group, release_process_group
from dpo_dist.errors import NumericsError
from dpo_dist.machine import deterministic_algorithms, keep_freed_memory
from dpo_dist.metrics import LOGGED_STATISTICS, MetricsFile
from dpo_dist.model import four_bits, load_model
from dpo_dist.phases import reach
from dpo_dist.pretrained import num_parameters
from dpo_dist.reference import ReferenceSync
from dpo_dist.run import Progress, Run, complete_save, require_sound, restore
from dpo_dist.selfcheck import Proof, check_agreement, prove
from dpo_dist.trainer import catch_up, evaluate_all, train
from dpo_dist.watch import watching

logger = logging.getLogger(__name__)


def run_training(config: RunConfig, cache_dir: Path) -> None:
    """One whole run: from configuration to exported model, or to a request to stop."""
    run_prepared(prepare_run(config, cache_dir), cache_dir)


def run_prepared(prepared: Prepared, cache_dir: Path) -> None:
    """The same of a run whose mistakes have been looked for."""
    config = prepared.config
    if config.model.deterministic is True:
        # cuBLAS reads it when it begins; without it torch finds its products not repeatable.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stop = StopRequest()
    end_with_launcher()
    timeout = timedelta(seconds=config.parallel.ddp_timeout)
    same_bits = deterministic_algorithms(config.model.deterministic is True)
    with same_bits, process_group(timeout, release_process_group) as ranks, stop.listening():
        adopt_process_group()
        plan = prepared.first_plan(ranks.world_size)
        # Before the models are loaded: ranks that disagree would wait for each other's shards for ever.
        check_agreement(facts(prepared, plan))
        announce(prepared, plan, ranks)
        # Before anything in it is looked at: a second run would take what the first is writing for leftovers.
        with locked(Path(config.train.output_dir), ranks):
            try:
                _run_in_folder(prepared, ranks, stop, cache_dir)
            except Stopped:
                if ranks.is_first:
                    logger.info("stopped before the first step; what was computed for the reference is kept")


def _run_in_folder(prepared: Prepared, ranks: Ranks, stop: StopRequest, cache_dir: Path) -> None:
    config = prepared.config
    store = CheckpointStore(Path(config.train.output_dir), ranks, config.checkpoint.save_total_limit)
    start = find_start(prepared, store)
    if ranks.is_first and start.text:
        logger.info(start.text)
        for change in start.changes:
            logger.warning(change)
    if start.is_finished:
        return
    choice = find_source(prepared, ranks, cache_dir)
    if ranks.is_first:
        logger.info("reference: %s", choice.text)
    run = _build(prepared, ranks, stop, store, start, choice)
    _open_folder(run, start)
    with watching(Path(config.train.output_dir), ranks, config.parallel.ddp_timeout, give_up), advising(run.more_room):
        _train_and_export(prepared, run, start)


def _train_and_export(prepared: Prepared, run: Run, start: Start) -> None:
    ranks = run.ranks
    progress = Progress() if start.checkpoint is None else restore(run, start.checkpoint)
    _keep_config(run, start)
    with reporting(run.num_steps, progress.step, visible=ranks.is_first) as report:
        run = replace(run, report=report)
        if start.checkpoint is None:
            _begin(run, progress)
        else:
            catch_up(run, progress)
        try:
            with measuring(run):
                train(run, progress)
        except NumericsError:  # raised by all ranks alike: what was being written until now is sound
            complete_save(run, progress, goes_on=False)
            raise
    if not progress.stopped:
        _load_best(run, progress)
        _export(prepared, run, progress)
    elif ranks.is_first:
        logger.info("stopped after step %d of %d; checkpoint.resume=auto goes on", progress.step, run.num_steps)
    if ranks.is_first:
        run.metrics_file.close()


def _build(
    prepared: Prepared, ranks: Ranks, stop: StopRequest, store: CheckpointStore, start: Start, choice: Choice
) -> Run:
    """Load what is needed and prove the run."""
    config = prepared.config
    torch.manual_seed(config.train.seed)
    if choice.cache is not None:
        fill_cache(prepared, ranks, choice.cache, stop)
    engine = reference_engine(prepared, ranks) if choice.source == "live" else None
    reach("load")
    policy = _policy(prepared, ranks)
    recomputation = settle_recomputation(prepared, ranks, policy)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    sync = _synchronisation(config, policy, engine)
    metrics_file = MetricsFile(Path(config.train.output_dir) / "metrics.jsonl")
    run = Run(
        config=config,
        ranks=ranks,
        dataset=prepared.dataset,
        evaluation_sets=prepared.evaluation_sets,
        sampler=prepared.sampler,
        packer=prepared.packer(ranks.world_size),
        policy=policy,
        reference=reference_of(prepared, choice, engine, policy),
        reference_identity=prepared.reference_identity,
        loss=losses.bind(config.loss),
        num_steps=prepared.num_steps,
        metrics_file=metrics_file,
        store=store,
        weights=Weights(policy, engine if sync else None),
        write_assets=asset_writer(prepared, policy, metrics_file),
        report=lambda line: None,
        after_update=sync or (lambda step: None),
        stop=stop,
        proof=None,
        pace=pace_of(prepared, ranks, policy, choice.source, recomputation),
        more_room=more_room(prepared, recomputation, ranks.world_size),
        compilations=prepared.compilations,
    )
    policy.compile_statistics((*run.loss.statistics, *LOGGED_STATISTICS))
    with advising(run.more_room):
        return replace(run, proof=_prove(prepared, run))


def _policy(prepared: Prepared, ranks: Ranks) -> TrainingEngine:
    config = prepared.config
    model = load_model(
        prepared.model_folder,
        prepared.model_config,
        register(prepared.attention[0], config.model.deterministic, config.model.torch_compile),
        prepared.dtype,
        prepared.deepspeed,
        wanted_at_loading(prepared),
        config.model.trust_remote_code,
        four_bits(config.adapter, prepared.dtype),
        config.model.use_liger_kernel,
        prepared.compilations,
    )
    if config.adapter.is_used:
        from dpo_dist.adapters import attach_adapter

        model = attach_adapter(
            model,
            config.adapter,
            base_model_name(prepared),
            config.train.seed,
            config.train.max_steps,
            prepared.deepspeed,
            prepared.tokenizer.path,
        )
    policy = TrainingEngine(model, prepared.deepspeed, config.train, ranks)
    if config.adapter.is_used:
        total = num_parameters(prepared.model_folder)
        logger.info("adapter: trains %d parameters beside %d of the model", policy.num_trained, total)
    return policy


def _synchronisation(
    config: RunConfig, policy: TrainingEngine, engine: InferenceEngine | None
) -> Callable[[int], object] | None:
    reference = config.reference
    if engine is None or not reference.sync_ref_model:
        return None
    return ReferenceSync(policy, engine, reference.ref_model_mixup_alpha, reference.ref_model_sync_steps)


def _prove(prepared: Prepared, run: Run) -> Proof | None:
    if not prepared.config.train.self_check:
        return None
    plan = run.plan(0)
    work = RankWork(plan, run.ranks.rank, run.dataset, run.packer.share_prompts)
    unlike = prepared.unlike
    proof = prove(run.policy, run.reference, work, plan, not unlike, run.packer.reference_max_tokens, unlike)
    if run.ranks.is_first:
        for line in proof.lines():
            logger.info(line)
    return proof


def _begin(run: Run, progress: Progress) -> None:
    """What a run writes before its first update."""
    if run.ranks.is_first:
        run.metrics_file.keep_until(-1)  # of an earlier start that was killed before its first checkpoint
        if run.proof is not None:
            run.metrics_file.write({"step": 0, "split": "self_check", "numerics/margin_noise": run.proof.margin_noise})
    if run.config.evaluation.eval_on_start:
        evaluate_all(run, progress)


def _open_folder(run: Run, start: Start) -> None:
    """Everything has been found right: the configuration first, so that whatever follows can be resumed."""
    with writing(Path(run.config.train.output_dir), run.ranks):
        if run.ranks.is_first:
            if start.checkpoint is None or not (Path(run.config.train.output_dir) / CONFIG_FILE).exists():
                write_config(run.config)
                is_float32 = run.policy.dtype == torch.float32
                require_space(run.config, checkpoint_bytes(run.policy.num_trained, is_float32))
            start_trackers(run.config, run.metrics_file, start.first_step)


def _keep_config(run: Run, start: Start) -> None:
    """The configuration of this start in the place of the last one's; not before its checkpoint has been accepted."""
    with writing(Path(run.config.train.output_dir), run.ranks):
        if run.ranks.is_first and start.checkpoint is not None:
            write_config(run.config)


def _load_best(run: Run, progress: Progress) -> None:
    """Put the weights of the best evaluation back, where they are asked for and there are such."""
    best = progress.health.best_step
    if not run.config.evaluation.load_best_model_at_end or best in (0, progress.step):
        return
    folder = run.store.find(str(run.store.path_of(best)))
    assert folder is not None, "a path is found, or refused"
    run.weights.read(folder)
    if run.ranks.is_first:
        logger.info("the model is that after step %d, the best of %d steps", best, progress.step)


def _export(prepared: Prepared, run: Run, progress: Progress) -> None:
    out = Path(run.config.train.output_dir) / "model"
    reach("export")
    require_sound(run, progress.step)
    write_model(prepared, run, out)
    with writing(out, run.ranks):
        if run.ranks.is_first:
            record_model(out, progress.step, run.store.path_of(progress.step).name)
