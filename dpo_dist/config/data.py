"""The section `data`."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from dpo_dist.config.addresses import is_url, shown_url
from dpo_dist.config.section import Flag, Number, Section, Text

_DATA_SUFFIX = re.compile(r"\.(jsonl|json|parquet|arrow|csv)(\.gz|\.zst)?$", re.IGNORECASE)

# Which of a row's completions are compared with each other.
Pairing = Literal["all", "best_vs_rest", "best_vs_worst", "adjacent", "list"]
# What becomes of completions that are only called good or bad: they are paired by prompt; what cannot be paired is kept
# as well; or nothing is paired, and pairs say no more of their completions either.
Rated = Literal["paired", "rest", "all"]


class DataSource(Section):
    """One data set."""

    path: Text
    """A file (.jsonl, .json, .parquet, .arrow or .csv, plain, .gz or .zst), a pattern of such files (`pairs-*.jsonl`),
    a folder of them, the URL of one of these (s3://, gs://, az://, hf://, https:// or another one of fsspec), or a hub
    id. A relative path is looked up in the current folder, then in the folder of the configuration file."""
    name: Text | None = None
    """Configuration of a hub data set that has several. null: its default."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set. null: its main branch."""
    columns: dict[Text, Text] = {}
    """Where columns are that the data call otherwise: `{prompt: question, chosen: answers.0.text}`. A path into a
    column goes on behind dots with names of fields, numbers of items, or `*` for every item."""
    split: Text = "train"
    """Split of a folder or hub data set. A single file has none."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows, the first ones. null: all."""
    fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the rows that is used: 0.25 takes every fourth one, of those that `limit` leaves. For mixtures."""

    @property
    def shown(self) -> str:
        """The path for messages and metrics: of a URL without what may be secret in it."""
        return shown_url(self.path) if is_url(self.path) else self.path


class DataConfig(Section):
    """What is trained on, and what happens to rows that do not fit or are faulty."""

    train: Annotated[list[DataSource], Field(min_length=1)]
    """Data sets to train on, one after another (mixed by train.shuffle)."""
    evaluation: list[DataSource] = []
    """Held-out data sets; each is evaluated as a whole, and reported under its own name."""
    holdout: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    """Share of the prompts of data.train that is not trained on but evaluated, of each data set as `<name>:holdout`.
    The text of a prompt decides on which side it is: never on both, and the same in every run."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus completion, in tokens. null: no limit except packing.max_tokens."""
    truncation_mode: Literal["drop", "keep_start", "keep_end_of_prompt", "error"] = "error"
    """What happens to an example longer than max_length: left out; its completions cut at their end; its prompt cut at
    its beginning (a conversation by whole turns, system messages stay); or the run is refused."""
    chat_template: Text | None = None
    """A file with a Jinja template that renders conversations in the place of the tokenizer's own, and is saved with
    the trained model. null: the tokenizer's."""
    assistant_only_loss: Flag = True
    """Of a completion of several turns learn the assistant's alone; what users and tools say in it is given. false:
    learn every token, as TRL's DPOTrainer does."""
    chat_template_kwargs: dict[Text, bool | int | float | str | None] = {}
    """What the chat template is given besides the conversation, such as `{enable_thinking: false}`. Give it to whatever
    serves the trained model too."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used, whatever is wrong with it (a line that is not JSON, a missing column
    or one of the wrong type, null, equal or empty completions, different prompts, over-long): `error` counts all such
    rows by reason and names the first ones; `skip` leaves them out and counts them. Always an error: a truncated file
    (a cut .gz or Parquet file), and token ids that the model does not have."""
    pairing: Pairing = "all"
    """Which completions of a row with `completions` and `scores` or `ranks` are compared: every two; the best with each
    other one; the best with the worst; neighbours in the order; or as a list (loss.loss_type=plackett_luce). Equally
    good ones are not. However many pairs there are, each completion is computed once."""
    group_by_prompt: Flag = False
    """Make one example of all rows of a data set that have the same prompt, so that it and the completions that they
    have in common are computed once. All tokens of a data set have to fit into memory for it."""
    num_proc: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenise, where there are more than a few thousand rows. null: as many as there are cores that
    this process may use, up to 8; one for token ids. Never changes the result. Each holds a tokenizer and some rows."""

    @property
    def has_held_out(self) -> bool:
        """Whether anything is evaluated."""
        return bool(self.evaluation) or self.holdout > 0

    @property
    def evaluation_names(self) -> tuple[str, ...]:
        """Name of each held-out set in metrics: the shortest end of its path that tells it apart, `:split` if not
        train. Those of data.evaluation come first, then the parts of data.train that data.holdout holds out."""
        parted = self.train if self.holdout else []
        sources = [*self.evaluation, *parted]
        splits = ["" if source.split == "train" else f":{source.split}" for source in sources]
        whole = [(source.path, source.name, source.split) for source in parted]
        for k, one in enumerate(whole):
            splits[len(self.evaluation) + k] += ":holdout" if whole.index(one) == k else f":holdout{k}"
        return _shortest_names(sources, splits)

    @property
    def train_names(self) -> tuple[str, ...]:
        """Name of each entry of data.train in metrics, likewise; of entries that name the same data the number too."""
        names = ["" if source.split == "train" else f":{source.split}" for source in self.train]
        whole = [(source.path, source.name, source.split) for source in self.train]
        return _shortest_names(
            self.train, [name + (f":{k}" if whole.index(whole[k]) < k else "") for k, name in enumerate(names)]
        )


def _shortest_names(sources: Sequence[DataSource], suffixes: Sequence[str]) -> tuple[str, ...]:
    """The shortest end of each path that tells it apart, with its suffix; where only what is hidden does, a number."""
    paths = [PurePosixPath(_DATA_SUFFIX.sub("", one.shown.removesuffix("?***")), one.name or "") for one in sources]
    parts = [path.parts for path in paths]
    for depth in range(1, max((len(part) for part in parts), default=0) + 1):
        names = tuple("/".join(part[-depth:]) + end for part, end in zip(parts, suffixes, strict=True))
        if len(set(names)) == len(names):
            return names
    whole = [source.shown.removesuffix("?***") + end for source, end in zip(sources, suffixes, strict=True)]
    return tuple(name + (f":{k}" if whole.index(name) < k else "") for k, name in enumerate(whole))
