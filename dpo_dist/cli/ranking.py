"""How `dpo-dist sample` lets completions be scored: by a judge on a server, or by a reward model in this process."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from dpo_dist.cli.describe import counted
from dpo_dist.cli.ending import advising
from dpo_dist.pretrained import identity, load_config, resolve_folder
from dpo_dist.sampling import Client, Group, Journal, Prompt, judge
from dpo_dist.sampling.judging import scores_of
from dpo_dist.sampling.rewarding import KEY, RewardModel, conversation_ids, require_reward_model
from dpo_dist.tokenization import TokenizerSpec, load_tokenizer
from dpo_dist.tokenization.tokenizer import tokenizer_digest

_TOLD_EVERY = 10.0  # seconds


def teller(what: str, total: int, num_before: int = 0) -> Callable[[int], None]:
    """Says now and then how far it is.

    Args:
        what: is counted.
        total: of them.
        num_before: those that were there already.
    """
    last = time.monotonic()

    def told(num_done: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _TOLD_EVERY:
            last = now
            typer.echo(f"{num_before + num_done:,} of {total:,} {what}", err=True)

    return told


class Judging:
    """By a judge.

    Args:
        client: its server.
        model: the name that it knows the judge by.
        num_at_once: requests.
    """

    def __init__(self, client: Client, model: str, num_at_once: int) -> None:
        self._client, self._model, self._num_at_once = client, model, num_at_once

    def rank(self, groups: Sequence[Group], journal: Journal) -> dict[str, list[float]]:
        """Scores of the completions of each prompt, by its key; what the journal lacks is asked for.

        Raises:
            ConfigError: the server does not answer.
        """
        num_there = sum(len(journal.verdicts(group.key, self._model)) for group in groups)
        total = sum(len(group.texts) * (len(group.texts) - 1) for group in groups)
        asked = [(group.key, group.prompt, group.texts) for group in groups]
        judge(self._client, self._model, asked, journal, self._num_at_once, teller("verdicts", total, num_there))
        return {group.key: scores_of(len(group.texts), journal.verdicts(group.key, self._model)) for group in groups}

    def remarks(self, groups: Sequence[Group], journal: Journal) -> list[str]:
        """What a user should know of it."""
        verdicts = [verdict for group in groups for verdict in journal.verdicts(group.key, self._model).values()]
        num_nonsense = sum(verdict.is_nonsense for verdict in verdicts)
        said = f"{counted(num_nonsense, 'verdict')} of {len(verdicts):,} made no sense and count as ties"
        return [said] if num_nonsense else []


class Rewarding:
    """By a reward model; what can be wrong with it is found before anything is sampled, and its weights are read after.

    Args:
        name: a folder or a hub id.
        trust_remote_code: run code that belongs to it.
        cache_dir: where dpo-dist keeps what it computes.
        prompts: of which completions will be scored.
        num_at_once: prompts, each with all of its completions.
    Raises:
        ModelError: it cannot be used.
    """

    def __init__(
        self, name: str, trust_remote_code: bool, cache_dir: Path, prompts: Sequence[Prompt], num_at_once: int
    ) -> None:
        self._trust, self._num_at_once = trust_remote_code, num_at_once
        self._folder = resolve_folder(name, KEY, None, cache_dir)
        self._config = load_config(self._folder, trust_remote_code, KEY, "--trust-remote-code")
        self._tokenizer = load_tokenizer(TokenizerSpec(str(self._folder), None, trust_remote_code, KEY))
        require_reward_model(self._folder, self._config, self._tokenizer, prompts)
        # The model and its template decide what a score is.
        self._id = f"{identity(self._folder, cache_dir / 'weights')}-{tokenizer_digest(self._tokenizer)[:16]}"

    def rank(self, groups: Sequence[Group], journal: Journal) -> dict[str, list[float]]:
        """Scores of the completions of each prompt, by its key; what the journal lacks is computed.

        A batch holds the same prompts whatever is there already, so that an interruption changes no rounding.

        Raises:
            DpoDistError: a conversation cannot be scored, or the model not be loaded.
        """
        size = self._num_at_once
        batches = [groups[start : start + size] for start in range(0, len(groups), size)]
        lacking = [batch for batch in batches if any(journal.scores(one.key, self._id) is None for one in batch)]
        if lacking:
            self._compute(lacking, len(groups), journal)
        return {group.key: journal.scores(group.key, self._id) or [] for group in groups}

    def _compute(self, batches: Sequence[Sequence[Group]], total: int, journal: Journal) -> None:
        ids = {
            group.key: conversation_ids(group.prompt, group.texts, self._folder, self._config, self._tokenizer)
            for batch in batches
            for group in batch
        }
        num_done = total - sum(map(len, batches))
        told = teller("prompts scored", total)
        model = RewardModel(self._folder, self._trust)
        for batch in batches:
            with advising("lower --batch-size; what was scored stays, and the same command goes on from there"):
                scores = iter(model.scores([one for group in batch for one in ids[group.key]]))
            journal.add_scores(self._id, [(one.key, [next(scores) for _ in ids[one.key]]) for one in batch])
            num_done += len(batch)
            told(num_done)

    def remarks(self, groups: Sequence[Group], journal: Journal) -> list[str]:
        """As `Judging`; there is nothing."""
        return []
