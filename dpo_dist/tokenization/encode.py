"""Text examples as token ids.

String rows: the prompt with the tokens its tokenizer puts in front of a text (BOS), each completion on its own, then
one EOS. Prompt and completion are tokenised apart, so that the prompt's ids are those the model sees when it is asked.

Message rows: the chat template renders the whole conversation, and the completion is all that it renders after the
prompt with its generation header. Nothing is added: the template writes BOS and end-of-turn tokens itself.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dpo_dist.config import DataConfig
from dpo_dist.data import Pair, PreferenceExample, RowFault
from dpo_dist.data.example import (
    CUT_ALIKE,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    IDENTICAL_COMPLETIONS,
    OVER_LONG,
    common_prefix_length,
    is_token_ids,
)
from dpo_dist.errors import ModelError
from dpo_dist.tokenization.conversation import Renderer
from dpo_dist.tokenization.given import GivenTurns
from dpo_dist.tokenization.notes import BOUNDARY_MERGED, PROMPT_NOT_A_PREFIX, SHORTENED, TRUNCATED
from dpo_dist.tokenization.text_ids import TextIds
from dpo_dist.tokenization.truncation import last_tokens, shorter_prompts
from dpo_dist.tokenization.turns import is_learned

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A prompt, its completions and the preferences among them, as token ids. `source` is `path:line`.

    Tokens of a completion that are not learned are -1 - id (`turns.py`). Without preferences its completion is a
    demonstration, or one that is only called good or bad: `ratings` then holds for each completion whether it is good.
    `is_ranked`: its row held a list of completions. `entry`: of data.train, counted from 0.
    """

    prompt_ids: Ids
    completion_ids: tuple[Ids, ...]
    pairs: tuple[Pair, ...]
    source: str
    weight: float = 1.0
    is_ranked: bool = False
    ratings: tuple[bool, ...] = ()
    entry: int = 0

    def beginning(self, limit: int | None) -> "TokenizedExample":
        """The same with only the first tokens of its prompt and of every completion; None: all of them."""
        if limit is None:
            return self
        return replace(
            self, prompt_ids=self.prompt_ids[:limit], completion_ids=tuple(ids[:limit] for ids in self.completion_ids)
        )


class Encoder:
    """Turns examples into token ids; counts in `notes` what it had to decide for the user.

    Args:
        tokenizer: None if every example holds token ids already.
        tokenizer_name: the tokenizer as `key=value` of the configuration, for messages.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, tokenizer_name: str) -> None:
        self.notes: Counter[str] = Counter()
        self.notes_of_rows: list[Counter[str]] = []
        """Those of each example of the last call."""
        self._data = data
        self._tokenizer = tokenizer
        self._tokenizer_name = tokenizer_name
        self.chat_template = str(getattr(tokenizer, "chat_template", None) or "")
        self._renderer = None
        self._text_ids = self._given = None
        if tokenizer is not None:
            self._renderer = Renderer(tokenizer, tokenizer_name, data.chat_template_kwargs)
            self._text_ids = TextIds(tokenizer)
            self._given = GivenTurns(self._renderer, self._text_ids) if data.assistant_only_loss else None
        self._leading_ids = leading_ids(tokenizer) if tokenizer is not None else ()

    def encode(self, examples: Sequence[PreferenceExample]) -> list[TokenizedExample | RowFault]:
        """Token ids of every example, in order, within `data.max_length`, or why it is of no use."""
        texts = [self._texts(example) for example in examples]
        ids = iter(self._tokenize([group for group in texts if isinstance(group, list)]))
        results: list[TokenizedExample | RowFault] = []
        self.notes_of_rows = []
        for example, group in zip(examples, texts, strict=True):
            notes = self.notes.copy()
            tokenized = group if isinstance(group, RowFault) else self._tokenized(example, group, next(ids))
            if isinstance(tokenized, RowFault):
                results.append(tokenized)
            else:
                found = self._checked(tokenized)
                # Completions that are paired with others' must keep the prompt that these have.
                if self._data.truncation_mode == "keep_end_of_prompt" and example.rating is None:
                    found = self._shortened(example, tokenized, found, notes)
                results.append(found)
            self.notes_of_rows.append(self.notes - notes)
        return results

    def _tokenized(
        self, example: PreferenceExample, texts: list[str], ids: list[list[int]]
    ) -> TokenizedExample | RowFault:
        prompt, completions = self._spans(example, texts, ids)
        marked = completions if self._given is None else self._given.marked(example, texts, completions)
        if isinstance(marked, RowFault):
            return marked
        ratings = () if example.rating is None else (example.rating,)
        rest = (example.pairs, example.source, example.weight, example.is_ranked, ratings)
        return TokenizedExample(prompt, marked, *rest)

    def _shortened(
        self,
        example: PreferenceExample,
        tokenized: TokenizedExample,
        found: TokenizedExample | RowFault,
        notes: Counter[str],
    ) -> TokenizedExample | RowFault:
        """The example with the end of its prompt, where it is too long and that is possible.

        Args:
            example: as text.
            tokenized: the same as token ids.
            found: what is said of it as a whole.
            notes: what was counted before it, for a conversation is rendered and counted anew.
        """
        if not isinstance(found, RowFault) or found.reason != OVER_LONG:
            return found
        if isinstance(example.prompt, str) or is_token_ids(example.prompt):
            assert self._data.max_length is not None
            room = self._data.max_length - max(len(ids) for ids in tokenized.completion_ids)
            ids = last_tokens(tokenized.prompt_ids, self._leading_ids, room)
            found = found if ids is None else self._checked(replace(tokenized, prompt_ids=ids))
        else:
            found = self._with_fewer_turns(example, found, notes)
        if not isinstance(found, RowFault):
            self.notes[SHORTENED] += 1
        return found

    def _with_fewer_turns(
        self, example: PreferenceExample, found: TokenizedExample | RowFault, notes: Counter[str]
    ) -> TokenizedExample | RowFault:
        """The conversation with as many of its last turns as fit."""
        prompts = list(shorter_prompts(example.prompt))  # pyright: ignore[reportArgumentType]
        low, high = 0, len(prompts)  # the first that fits lies between; a shorter one fits as well
        counted = notes
        while low < high:
            middle = (low + high) // 2
            self.notes = notes.copy()
            shorter = replace(example, prompt=prompts[middle])
            attempt = self._texts(shorter)
            if not isinstance(attempt, RowFault):
                attempt = self._tokenized(shorter, attempt, *self._tokenize([attempt]))
            if not isinstance(attempt, RowFault):
                attempt = self._checked(attempt)
            if isinstance(attempt, RowFault) and attempt.reason == OVER_LONG:
                low = middle + 1
            else:
                found, high, counted = attempt, middle, self.notes
        self.notes = counted.copy()
        return found

    # ---- text

    def _texts(self, example: PreferenceExample) -> list[str] | RowFault:
        """What has to be tokenised: prompt and completions, or prompt and whole conversations; [] for token ids."""
        if is_token_ids(example.prompt):
            return []
        if isinstance(example.prompt, str):
            return [example.prompt, *example.completions]  # pyright: ignore[reportReturnType]
        self._required_tokenizer(example.source)
        assert self._renderer is not None
        return self._renderer.texts(example)

    def _tokenize(self, groups: list[list[str]]) -> list[list[list[int]]]:
        """The ids of the texts of each example."""
        if not any(groups):
            return [[] for _ in groups]
        self._required_tokenizer("")
        assert self._text_ids is not None
        return self._text_ids.of_groups(groups)

    def _required_tokenizer(self, where: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ModelError(f"{where}: the row holds text, and no tokenizer is given; name one in the configuration")
        return self._tokenizer

    # ---- token ids

    def _spans(self, example: PreferenceExample, texts: list[str], ids: list[list[int]]) -> tuple[Ids, tuple[Ids, ...]]:
        """Prompt and completions of one example as token ids."""
        if not texts:
            return example.prompt, example.completions  # pyright: ignore[reportReturnType]
        if isinstance(example.prompt, str):
            return self._string_spans(ids, example.source)
        return self._conversation_spans(texts, ids)

    def _string_spans(self, ids: list[list[int]], source: str) -> tuple[Ids, tuple[Ids, ...]]:
        prompt, *completions = (tuple(part) for part in ids)
        # A prompt that was written with its BOS gets no second one.
        if prompt and prompt[: len(self._leading_ids)] != self._leading_ids:
            prompt = self._leading_ids + prompt
        eos = self._required_tokenizer(source).eos_token_id
        if not isinstance(eos, int):
            raise ModelError(
                f"{self._tokenizer_name} has no EOS token, and {source} holds strings, whose completions end with "
                "one; set eos_token in its tokenizer_config.json, or give rows of messages"
            )
        # An empty completion stays empty, so that it is found below.
        return prompt, tuple(part if not part or part[-1] == eos else (*part, eos) for part in completions)

    def _conversation_spans(self, texts: list[str], ids: list[list[int]]) -> tuple[Ids, tuple[Ids, ...]]:
        """Cut each tokenised conversation where the prompt ends.

        Normally the prompt's ids begin the conversation's. Where text merges across the border, the rest is tokenised
        on its own: the model is asked with exactly the prompt's ids. Where the template renders the prompt in another
        way once an answer follows, the border is where all renderings still agree, and no token is lost; no words of
        the prompt stand behind it (`conversation.py`).
        """
        prompt_text, *conversation_texts = texts
        prompt, *conversations = (tuple(part) for part in ids)
        if not all(text.startswith(prompt_text) for text in conversation_texts):
            self.notes[PROMPT_NOT_A_PREFIX] += 1
            border = min(common_prefix_length(prompt, conversation) for conversation in conversations)
            return prompt[:border], tuple(conversation[border:] for conversation in conversations)
        if all(conversation[: len(prompt)] == prompt for conversation in conversations):
            return prompt, tuple(conversation[len(prompt) :] for conversation in conversations)
        self.notes[BOUNDARY_MERGED] += 1
        (rests,) = self._tokenize([[text[len(prompt_text) :] for text in conversation_texts]])
        return prompt, tuple(tuple(rest) for rest in rests)

    def _checked(self, example: TokenizedExample) -> TokenizedExample | RowFault:
        """The example within `data.max_length`, with a prompt and completions that can be told apart."""
        if not example.prompt_ids:
            return RowFault(EMPTY_PROMPT, example.source, "the prompt has no token before the completions begin")
        fitted = self._fitted(example)
        if isinstance(fitted, RowFault):
            return fitted
        if not all(fitted.completion_ids):
            return RowFault(EMPTY_COMPLETION, example.source, "a completion has no token")
        if not all(is_learned(max(ids)) for ids in fitted.completion_ids):
            return RowFault(EMPTY_COMPLETION, example.source, "a completion has no token of the assistant's")
        for pair in fitted.pairs:
            if fitted.completion_ids[pair.chosen] == fitted.completion_ids[pair.rejected]:
                if fitted is not example:
                    what = f"chosen and rejected are identical within data.max_length={self._data.max_length}"
                    return RowFault(CUT_ALIKE, example.source, what, "raise data.max_length")
                what = "chosen and rejected are identical as token ids"
                return RowFault(IDENTICAL_COMPLETIONS, example.source, what)
        # Counted last: only rows that are used.
        if fitted is not example:
            self.notes[TRUNCATED] += 1
        return fitted

    def _fitted(self, example: TokenizedExample) -> TokenizedExample | RowFault:
        limit = self._data.max_length
        num_prompt = len(example.prompt_ids)
        longest = num_prompt + max(len(ids) for ids in example.completion_ids)
        if limit is None or longest <= limit:
            return example
        if self._data.truncation_mode == "keep_start" and num_prompt < limit:
            # TRL's rule. No EOS is put at the cut: it would teach the model to stop in mid-sentence.
            cut = tuple(ids[: limit - num_prompt] for ids in example.completion_ids)
            return replace(example, completion_ids=cut)
        what = f"prompt and completion have {longest} tokens (the prompt {num_prompt}), data.max_length={limit}"
        way_out = "raise data.max_length, or set data.truncation_mode=drop, keep_start or keep_end_of_prompt"
        return RowFault(OVER_LONG, example.source, what, way_out)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What the tokenizer puts before a text (BOS, if any); what it puts after one, such as EOS, is not the prompt's."""
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a")["input_ids"]
    for start in range(len(with_special) - len(probe) + 1):
        if with_special[start : start + len(probe)] == probe:
            return tuple(with_special[:start])
    return ()
