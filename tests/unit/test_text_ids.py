"""Texts that are cut at a token of the chat template have the ids that they have as a whole."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.tokenization import load_tokenizer
from dpo_dist.tokenization.text_ids import TextIds
from tests.byte_tokenizer import save_tokenizer

_PARTS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_st",
    "art|>",
    "\n",
    "\n\n",
    " ",
    "user",
    "a",
    "é",
    "<s>",
    "|",
    "<",
    "  <|im_end|>",
]


def _loaded(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(save_tokenizer(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _groups() -> list[list[str]]:
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(_PARTS, k=draw.randint(0, 9)))

    groups = [
        [prompt, *(prompt + text() for _ in range(draw.randint(1, 3)))] for prompt in (text() for _ in range(300))
    ]
    return [*groups, *([text(), text()] for _ in range(50)), [], ["", ""]]


@pytest.mark.parametrize(
    "token",
    [
        None,
        AddedToken("t|><|im", normalized=False),
        AddedToken("<|im_start|>user", normalized=False),
        AddedToken("|>", normalized=False),
        AddedToken("<|im_end|>\n", normalized=False, rstrip=True),
        AddedToken("user", normalized=False, single_word=True),
        AddedToken("\n", normalized=True, lstrip=True, rstrip=True),
        AddedToken("<|im_end|>", normalized=False, lstrip=True, special=True),
    ],
)
def test_ids_are_those_of_the_whole_text(tmp_path: Path, token: AddedToken | None) -> None:
    tokenizer = _loaded(tmp_path)
    if token is not None:
        tokenizer.backend_tokenizer.add_tokens([token])
    groups = _groups()
    found = TextIds(tokenizer).of_groups(groups)
    calls = [tokenizer(g, add_special_tokens=False, truncation=False, padding=False)["input_ids"] for g in groups if g]
    assert [ids for ids in found if ids] == calls


def test_only_the_first_piece_of_a_text_gets_what_stands_before_it(tmp_path: Path) -> None:
    tokenizer = _loaded(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("a", prepend_scheme="first")
    groups = _groups()
    found = TextIds(tokenizer).of_groups(groups)
    calls = [tokenizer(g, add_special_tokens=False, truncation=False, padding=False)["input_ids"] for g in groups if g]
    assert [ids for ids in found if ids] == calls


def test_a_token_that_may_not_be_found_everywhere_is_no_border(tmp_path: Path) -> None:
    plain, overlapping = _loaded(tmp_path), _loaded(tmp_path)
    overlapping.backend_tokenizer.add_tokens([AddedToken("x<|im_", normalized=False)])
    border = TextIds(plain)._border
    assert border is not None and border.findall("<|im_start|>a<|im_end|>") == ["<|im_start|>", "<|im_end|>"]
    border = TextIds(overlapping)._border
    assert border is not None and not border.findall("<|im_start|>a<|im_end|>")


def test_a_tokenizer_with_a_call_of_its_own_is_asked_as_a_whole(tmp_path: Path) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: object, **kwargs: object) -> object:
            found = super()._encode_plus(*args, **kwargs)
            found["input_ids"] = [[*ids, 7] for ids in found["input_ids"]]
            return found

    _loaded(tmp_path)
    assert [ids[-1] for ids in TextIds(Own.from_pretrained(tmp_path)).of(["a", "b"])] == [7, 7]
