"""Texts as token ids, and where a text can be cut without a change of them.

A tokenizer of the Rust library is asked directly, for ids alone: transformers has it compute offsets and masks as well,
for a third of the time. And conversations that begin with the same prompt share the ids of that beginning, up to the
last token of the chat template in it, such as <|im_start|>. Such a token is found in a text before anything else
happens to it; what stands before and behind is then tokenised apart anyway, so that the ids are those of the whole.
"""

import re
from collections.abc import Sequence
from itertools import chain, pairwise

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Texts in one call: few enough that what the library makes of them stays in the processor's cache.
_AT_ONCE = 128


class TextIds:
    """Turns texts into token ids, without those that a tokenizer puts around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        borders = _borders(tokenizer, self._backend) if self._backend is not None else ()
        self._border = re.compile("|".join(map(re.escape, borders))) if borders else None

    def of(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if not texts:
            return []
        # Truncation and padding are switched off by name: a tokenizer.json may have them on.
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
            parts = (texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE))
            encodings = (self._backend.encode_batch_fast(list(part), add_special_tokens=False) for part in parts)
            return [encoding.ids for part in encodings for encoding in part]
        # verbose=False: whether a text is too long is decided elsewhere, not by the tokenizer's model_max_length.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return encoded["input_ids"]

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """The ids of a text, and of each where it begins and ends in it; None where the tokenizer does not tell."""
        if self._backend is None:
            return None
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def of_groups(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids of each text of each group, as one by one; what several texts hold is tokenised once."""
        split = [self._split(group) for group in groups]
        pieces = list(dict.fromkeys(piece for shared, rests in split for piece in (*shared, *rests)))
        ids = dict(zip(pieces, self.of(pieces), strict=True))
        found: list[list[list[int]]] = []
        for shared, rests in split:
            beginning = list(chain.from_iterable(ids[piece] for piece in shared))
            found.append([beginning + ids[rest] for rest in rests])
        return found

    def _split(self, group: Sequence[str]) -> tuple[list[str], Sequence[str]]:
        """The pieces that all texts of a group begin with, and what follows them in each."""
        if self._border is None or not group or not all(text.startswith(group[0]) for text in group):
            return [], group
        cuts = [found.start() for found in self._border.finditer(group[0])]
        if not cuts:
            return [], group
        shared = [group[0][begin:end] for begin, end in pairwise([0, *cuts])]
        return shared, [text[cuts[-1] :] for text in group]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the Rust library, where it does all that a call of the whole does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does_all = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in ("__call__", "_encode_plus", "_switch_to_input_mode")
    )
    return backend if does_all and isinstance(backend, Tokenizer) else None


def _borders(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> tuple[str, ...]:
    """Tokens of the chat template in front of which any text can be cut.

    Such a one is found wherever it stands: no other token overlaps with it, nor does it with itself, it takes no space
    around it, and what is found before it does not depend on what follows.
    """
    added: list[AddedToken] = list(backend.get_added_tokens_decoder().values())
    # Then they are text like any other; and whether a whole word is found depends on the character behind it.
    if tokenizer.split_special_tokens or any(token.single_word for token in added):
        return ()
    names = [token.content for token in added if token.content]
    written = f"{tokenizer.chat_template or ''} {' '.join(map(str, tokenizer.special_tokens_map.values()))}"
    return tuple(
        token.content
        for token in added
        if token.content in written
        and token.content.strip()
        and not (token.normalized or token.lstrip or token.rstrip or token.content[0].isspace())
        and not any(_overlap(name, token.content) for name in names)
    )


def _overlap(other: str, token: str) -> bool:
    """Whether a match of another token may hold the beginning of this one, or more of it."""
    if other != token and token in other:
        return True
    return any(other.endswith(token[:length]) for length in range(1, min(len(token), len(other) + 1)))
