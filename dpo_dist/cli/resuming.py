"""What a run goes on from, found and judged before any model is loaded. Shared by `check` and `train`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.checkpoint import (
    CheckpointStore,
    RunState,
    changed_settings,
    layout_at,
    layout_of,
    require_same,
)
from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.run_folder import is_model_of
from dpo_dist.config import ReferenceConfig, keys_without_effect
from dpo_dist.distributed import broadcast_json
from dpo_dist.errors import CheckpointError
from dpo_dist.health import restored


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None  # None: at the starting weights
    first_step: int  # the first line of metrics it may write
    is_finished: bool  # every step has been made, and the model been written
    text: str  # what to tell the user; "" where it is what anybody expects
    changes: list[str] = field(default_factory=list)  # settings that are not what they were, one line each


def find_start(prepared: Prepared, store: CheckpointStore, look_only: bool = False) -> Start:
    """Where `checkpoint.resume` says that the run begins. Collective: every rank must call it.

    Args:
        prepared: The run.
        store: Its checkpoints.
        look_only: As in `CheckpointStore.find`.
    Raises:
        CheckpointError: the checkpoint is damaged, or of another run: other data, reference or order of examples.
    """
    resume = prepared.config.checkpoint.resume
    folder = store.find(resume, look_only)
    if folder is None:
        none_found = f"checkpoint.resume=auto: no checkpoint in {store.folder}, starting from the beginning"
        return Start(None, 0, False, none_found if resume == "auto" else "")
    state = store.load_state(folder)
    _require_same_run(prepared, folder, state)
    model = Path(prepared.config.train.output_dir) / "model"
    ended = restored(state.health, state.config, prepared.config).ended
    is_over = state.step >= prepared.num_steps or bool(ended)
    is_finished = broadcast_json(
        is_over and store.ranks.is_first and is_model_of(model, state.step, folder.name, look_only)
    )
    text = f"checkpoint.resume: {state.step} of {prepared.num_steps} steps are done in {folder}"
    if is_finished:
        way_on = (
            "other settings of evaluation and health" if ended else "more train.max_steps or train.num_train_epochs"
        )
        text += f" and the model is in {model}: nothing is left to do; with {way_on} it would go on"
    if ended:
        text += f" (ended early: {ended})"
    changes = [
        f"changed since the checkpoint: {one}"
        for one in changed_settings(state, prepared.config.model_dump(mode="json"))
    ]
    changes += _shared_out(prepared, folder, state, store.ranks.world_size)
    return Start(folder, state.step + 1, is_finished, text, changes)


def _shared_out(prepared: Prepared, folder: Path, state: RunState, world_size: int) -> list[str]:
    """What to tell where other processes go on, or another ZeRO stage.

    Raises:
        CheckpointError: it cannot be done with what is on NVMe.
    """
    zero = prepared.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    saved, current = layout_of(folder), layout_at(stage, world_size)
    if saved is None or (saved == current and state.world_size == world_size):
        return []
    before, now = _who(state.world_size, saved.stages), _who(world_size, str(stage))
    devices = {zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")}
    if saved != current and "nvme" in devices:
        raise CheckpointError(
            f"checkpoint.resume: {folder} was saved by {before}, and what parallel.deepspeed of this run keeps on NVMe "
            f"cannot be shared out anew; go on with a file that keeps it in memory, or with {before}"
        )
    anew = "weights and optimizer are shared out anew; " if saved != current else ""
    return [
        f"{folder.name} was saved by {before} and goes on with {now}: {anew}steps keep their examples, and losses are "
        "equal but for rounding"
    ]


def _who(world_size: int, stage: str) -> str:
    return f"{world_size} process{'es' if world_size > 1 else ''} at ZeRO stage {stage}"


def _require_same_run(prepared: Prepared, folder: Path, state: RunState) -> None:
    train = prepared.config.train
    shuffle = state.config.get("train", {}).get("shuffle", train.shuffle)
    facts: dict[str, tuple[object, object]] = {
        "train.seed": (state.seed, train.seed),
        "train.shuffle": (shuffle, train.shuffle),
        "the training data": (state.data_fingerprint, prepared.dataset.fingerprint),
        "the reference": (state.reference_identity, prepared.reference_identity),
        # One that followed the policy is not its folder's weights any more.
        "reference.sync_ref_model": (
            state.config.get("reference", {}).get("sync_ref_model", False),
            prepared.config.reference.sync_ref_model,
        ),
    }
    if ("train", "seed") in keys_without_effect(prepared.config):
        del facts["train.seed"]
    facts |= _of_section("adapter", state, prepared, ("adapter_name_or_path",))  # its tensors are in the checkpoint
    facts |= _of_section("reference", state, prepared, tuple(ReferenceConfig.model_fields.keys() - {"dtype"}))
    if state.data_fingerprint == prepared.dataset.fingerprint:  # else they differ because of the data
        seen = prepared.sampler.examples_seen(state.step)
        facts[f"examples of {state.step} steps (train.examples_per_step)"] = (state.examples_seen, seen)
    require_same(folder, facts)


def _of_section(
    section: str, state: RunState, prepared: Prepared, free: tuple[str, ...]
) -> dict[str, tuple[object, object]]:
    """Settings that decide what is trained, or against what, and therefore stay what they were."""
    now = prepared.config.model_dump(mode="json")[section]
    was: Any = state.config.get(section, now)
    return {f"{section}.{key}": (was.get(key, value), value) for key, value in now.items() if key not in free}
