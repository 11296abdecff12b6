"""What `dpo-dist sample` does: read prompts, sample, let them be scored (ranking.py), and write the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.cli.describe import counted
from dpo_dist.cli.ending import advising
from dpo_dist.cli.ranking import Judging, Rewarding, teller
from dpo_dist.config import DataSource
from dpo_dist.data import RowFault, open_source
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.pretrained import identity, load_config, resolve_folder
from dpo_dist.sampling import (
    Client,
    Group,
    Journal,
    LocalSampler,
    Prompt,
    Settings,
    prompt_ids,
    read_prompts,
    sample_from_server,
)
from dpo_dist.sampling.journal import write_rows
from dpo_dist.tokenization import TokenizerSpec, load_tokenizer
from dpo_dist.tokenization.bad_rows import BadRows
from dpo_dist.tokenization.tokenizer import tokenizer_digest


@dataclass(frozen=True)
class Reading:
    """Which prompts."""

    path: str
    limit: int | None
    as_text: bool
    skip_bad: bool


@dataclass(frozen=True)
class Servers:
    """Where they are sampled and judged."""

    server: str | None
    judge: str | None
    judge_model: str | None
    api_key: str | None
    timeout: float

    def client(self, option: str, url: str) -> Client:
        """For one of them."""
        return Client(option, url, self.api_key, self.timeout)


@dataclass(frozen=True)
class Wanted:
    """What a user asked for."""

    reading: Reading
    model: str
    trust_remote_code: bool
    out: Path
    how: Settings  # but for its model, which is to be found
    batch_size: int
    servers: Servers
    reward_model: str | None


def run_sample(wanted: Wanted, cache_dir: Path) -> str:
    """Write the rows, and tell what became of the prompts.

    Raises:
        DpoDistError: a mistake in an option or in the data, or a server that does not answer.
    """
    _check(wanted)
    servers = wanted.servers
    judging = servers.client("--judge", servers.judge) if servers.judge else None
    left_out = BadRows()
    prompts, num_rows = _prompts(wanted.reading, left_out, cache_dir / "data")
    num_repeated = num_rows - left_out.total - len(prompts)
    if servers.server:
        sampling: _Local | _Remote = _Remote(wanted, servers.client("--server", servers.server))
    else:
        sampling = _Local(wanted, cache_dir, prompts)
        prompts = sampling.usable(left_out)
    if left_out.total and not wanted.reading.skip_bad:
        text = left_out.refusal("PROMPTS", num_rows).replace("set data.on_bad_row=skip", "give --skip-bad")
        raise DataError(text)
    if not prompts:
        raise DataError(f"PROMPTS={wanted.reading.path} has no prompt that can be used\n{left_out.listing()}")
    ranking: Judging | Rewarding | None = None
    if judging is not None:
        ranking = Judging(judging, str(servers.judge_model), wanted.batch_size)
    elif wanted.reward_model is not None:
        ranking = Rewarding(wanted.reward_model, wanted.trust_remote_code, cache_dir, prompts, wanted.batch_size)
    partial = wanted.out.with_name(f"{wanted.out.name}.partial")
    with Journal(partial, sampling.settings) as journal:
        sampling.sample(prompts, journal)
        groups = [Group.of(prompt, sampling.settings, journal) for prompt in prompts]
        compared = [group for group in groups if len(group.texts) > 1]
        scores = ranking.rank(compared, journal) if ranking else None
        remarks = ranking.remarks(compared, journal) if ranking else []
        rows = [group.row(scores[group.key] if scores is not None else None) for group in compared]
        if not rows:
            raise DataError(
                f"no prompt of {wanted.reading.path} has two different completions that say something; raise "
                "--temperature or --max-new-tokens, and give another --out"
            )
        write_rows(wanted.out, rows)
        partial.unlink()
        told = _told(wanted, groups, rows, scores)
        return "\n".join([*_left_out(left_out, num_repeated), *told[:-1], *remarks, told[-1]])


def _check(wanted: Wanted) -> None:
    how, out, servers = wanted.how, wanted.out, wanted.servers
    if not 0 < how.temperature < float("inf"):
        raise ConfigError(f"--temperature={how.temperature} gives one completion only; give a number above 0")
    if not 0 < how.top_p <= 1:
        raise ConfigError(f"--top-p={how.top_p} is no probability; give a number above 0, up to 1")
    if servers.judge is not None and wanted.reward_model is not None:
        raise ConfigError(f"--judge={servers.judge} and --reward-model={wanted.reward_model} both score; give one")
    if (servers.judge is None) != (servers.judge_model is None):
        raise ConfigError("--judge and --judge-model belong together; give both, or none of them")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out={out} is not JSON Lines by its name; give one such as {out.name}.jsonl")
    if out.exists():
        raise ConfigError(f"--out={out} is there already; give another name, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: {out.parent} is no folder; give a folder that is there")


def _prompts(reading: Reading, left_out: BadRows, cache_dir: Path) -> tuple[list[Prompt], int]:
    """Each once, and the number of rows."""
    source = open_source(DataSource(path=reading.path, limit=reading.limit), "PROMPTS", cache_dir=cache_dir)
    found: dict[Any, Prompt] = {}
    num_rows = 0
    for one in read_prompts(source, reading.as_text):
        num_rows += 1
        if isinstance(one, RowFault):
            left_out.add(one)
        else:
            found.setdefault(one.identity, one)
    return list(found.values()), num_rows


class _Local:
    """Sampling with transformers."""

    def __init__(self, wanted: Wanted, cache_dir: Path, prompts: Sequence[Prompt]) -> None:
        self._wanted, key = wanted, "--model"
        self._folder = resolve_folder(wanted.model, key, None, cache_dir)
        config = load_config(self._folder, wanted.trust_remote_code, key, "--trust-remote-code")
        spec = TokenizerSpec(str(self._folder), None, wanted.trust_remote_code, key)
        self._tokenizer = load_tokenizer(spec)
        # The template and the tokens decide what is asked.
        digests = f"{identity(self._folder, cache_dir / 'weights')}-{tokenizer_digest(self._tokenizer)[:16]}"
        self.settings = replace(wanted.how, model=digests)
        longest = getattr(config, "max_position_embeddings", None)
        room = longest - wanted.how.max_new_tokens if isinstance(longest, int) else None
        ids = prompt_ids(prompts, self._tokenizer, wanted.model, room)
        self._ids = dict(zip(prompts, ids, strict=True))

    def usable(self, left_out: BadRows) -> list[Prompt]:
        """The prompts that the model can be asked with."""
        for ids in self._ids.values():
            if isinstance(ids, RowFault):
                left_out.add(ids)
        return [prompt for prompt, ids in self._ids.items() if not isinstance(ids, RowFault)]

    def sample(self, prompts: Sequence[Prompt], journal: Journal) -> None:
        """All completions that the journal lacks; a batch holds the same prompts whatever is there already."""
        size, num = self._wanted.batch_size, self.settings.num_completions
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        missing = [
            batch
            for batch in batches
            if any(len(journal.completions[prompt.key(self.settings)]) < num for prompt in batch)
        ]
        if not missing:
            return
        told = teller("prompts sampled", len(prompts))
        sampler = LocalSampler(self._folder, self._tokenizer, self.settings, self._wanted.trust_remote_code)
        num_done = len(prompts) - sum(len(batch) for batch in missing)
        for batch in missing:
            with advising("lower --batch-size or --max-new-tokens; with another --batch-size it goes on from here"):
                found = sampler.sample(batch, [self._ids[prompt] for prompt in batch])  # pyright: ignore
            keys = [prompt.key(self.settings) for prompt in batch]
            journal.add_completions(
                [(key, k, one) for key, group in zip(keys, found, strict=True) for k, one in enumerate(group)]
            )
            num_done += len(batch)
            told(num_done)


class _Remote:
    """Sampling from a server."""

    def __init__(self, wanted: Wanted, client: Client) -> None:
        self._wanted, self._client = wanted, client
        self.settings = replace(wanted.how, model=f"{wanted.model} of a server")

    def sample(self, prompts: Sequence[Prompt], journal: Journal) -> None:
        """All completions that the journal lacks."""
        told = teller("completions sampled", len(prompts) * self.settings.num_completions, journal.num_completions)
        size = self._wanted.batch_size
        sample_from_server(self._client, self._wanted.model, prompts, self.settings, journal, size, told)


def _left_out(left_out: BadRows, num_repeated: int) -> list[str]:
    lines = []
    if left_out.total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.counts.items()))
        lines.append(f"{counted(left_out.total, 'row')} left out ({reasons})")
    if num_repeated:
        lines.append(f"{counted(num_repeated, 'row')} with a prompt that was there before: each prompt is sampled once")
    return lines


def _told(
    wanted: Wanted,
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
    scores: Mapping[str, list[float]] | None,
) -> list[str]:
    num_sampled = len(groups) * wanted.how.num_completions
    num_empty, num_cut = sum(group.num_empty for group in groups), sum(group.num_cut for group in groups)
    num_same = num_sampled - num_empty - sum(len(group.texts) for group in groups)
    lines = [
        f"{counted(num_sampled, 'completion')} of {counted(len(groups), 'prompt')}: {num_same:,} said the same as "
        f"another, {num_empty:,} said nothing, {num_cut:,} reached --max-new-tokens"
    ]
    if num_alone := len(groups) - len(rows):
        lines.append(f"{counted(num_alone, 'prompt')} left out: fewer than two different completions")
    if scores is None:
        return [
            *lines,
            f"{wanted.out}: {counted(len(rows), 'row')} without scores; they need a column scores or ranks before they "
            "can be trained on",
        ]
    if num_tied := sum(len(set(found)) == 1 for found in scores.values()):
        lines.append(f"{counted(num_tied, 'prompt')} with all completions tied: training leaves them out")
    return [*lines, f"{wanted.out}: {counted(len(rows), 'row')}; train on them with data.train.0.path={wanted.out}"]
