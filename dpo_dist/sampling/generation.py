"""Completions by transformers' `generate`, each with random numbers of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from dpo_dist.data import PreferenceExample, RowFault
from dpo_dist.data.example import OVER_LONG
from dpo_dist.errors import ModelError
from dpo_dist.pretrained import first_line, raise_if_own_code
from dpo_dist.sampling.journal import Completion
from dpo_dist.sampling.prompts import Prompt, Settings
from dpo_dist.tokenization.conversation import Renderer
from dpo_dist.tokenization.encode import leading_ids

Ids = tuple[int, ...]


def prompt_ids(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, model: str, room: int | None
) -> list[Ids | RowFault]:
    """What the model is asked with: for a conversation as the chat template has it, else as in training.

    Args:
        prompts: strings or messages.
        tokenizer: the model's.
        model: its name, for messages.
        room: tokens that a prompt may have; None: any number.
    Raises:
        ModelError: there are messages, and no chat template.
    """
    if not tokenizer.chat_template and any(not isinstance(prompt.text, str) for prompt in prompts):
        raise ModelError(
            f"--model={model} has no chat template, and the prompts are messages; name an instruct model, or give "
            "--text if they are strings that the model goes on with"
        )
    renderer, leading = Renderer(tokenizer, f"--model={model}", {}), leading_ids(tokenizer)
    found: list[Ids | RowFault] = []
    for prompt in prompts:
        texts: list[str] | RowFault = [prompt.text] if isinstance(prompt.text, str) else []
        if not texts:
            texts = renderer.texts(PreferenceExample(prompt.text, (), (), source=prompt.source))
        if isinstance(texts, RowFault):
            found.append(texts)
            continue
        # Truncation and padding are switched off by name: a tokenizer.json may have them on.
        encoded = tokenizer(texts[0], add_special_tokens=False, truncation=False, padding=False, verbose=False)
        ids: Ids = tuple(encoded["input_ids"])
        if isinstance(prompt.text, str) and ids[: len(leading)] != leading:
            ids = leading + ids
        if room is not None and len(ids) > room:
            what = f"the prompt has {len(ids)} tokens, and with --max-new-tokens the model has room for {room}"
            found.append(RowFault(OVER_LONG, prompt.source, what, "shorten it, or lower --max-new-tokens"))
        else:
            found.append(ids)
    return found


class SeededSampling(LogitsProcessor):
    """Chooses the next token of every row with the row's own random numbers, and leaves only that one possible.

    transformers draws all rows of a batch from one stream, so that a completion would depend on its neighbours.

    Args:
        uniform_RN: numbers from 0 to 1, one for each row and step.
        temperature: what scores are divided by.
        top_p: the likeliest tokens that together have this probability can be chosen.
    """

    def __init__(self, uniform_RN: Float[Tensor, "R N"], temperature: float, top_p: float) -> None:
        self._uniform_RN, self._temperature, self._top_p = uniform_RN, temperature, top_p
        self._step = 0

    def __call__(self, input_ids: Int[Tensor, "R _"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """Scores of 0 for the chosen token and of -inf for all others."""
        probs_RV = torch.softmax(scores.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
            before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
            kept_RV = torch.where(before_RV < self._top_p, sorted_RV, 0.0)
            probs_RV = torch.zeros_like(probs_RV).scatter(1, order_RV, kept_RV)
        cumulative_RV = probs_RV.cumsum(dim=-1)
        target_R1 = self._uniform_RN[:, self._step : self._step + 1] * cumulative_RV[:, -1:]
        token_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True).clamp(max=scores.shape[1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token_R1, 0.0)


class LocalSampler:
    """A model on the device that is there.

    Args:
        folder: of the model.
        tokenizer: its own.
        settings: how to sample.
        trust_remote_code: run code that lies in the folder.
    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings, trust_remote_code: bool
    ) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
            )
        # Whatever a folder lacks, transformers says it in its own way.
        except Exception as error:
            raise_if_own_code(error, f"--model={folder}", "--trust-remote-code")
            raise ModelError(f"--model={folder} cannot be loaded ({first_line(error)}); give a whole model") from error
        self._model.to(self._device).eval()
        own = self._model.generation_config.eos_token_id
        ends: list[Any] = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, _end_of_turn(tokenizer)]
        self._ends: set[int] = {int(end) for end in ends if end is not None}
        # What the model's own file says, such as a penalty for repetition, would be a policy that is not trained.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # `SeededSampling` has chosen already
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
        )

    def sample(self, prompts: Sequence[Prompt], ids: Sequence[Ids]) -> list[list[Completion]]:
        """The completions of each prompt, in one batch."""
        num = self._settings.num_completions
        width = max(len(one) for one in ids)
        padded = [[0] * (width - len(one)) + list(one) for one in ids for _ in range(num)]
        mask = [[0] * (width - len(one)) + [1] * len(one) for one in ids for _ in range(num)]
        uniform_RN = torch.stack([self._uniform(prompt, k) for prompt in prompts for k in range(num)])
        chooser = SeededSampling(uniform_RN.to(self._device), self._settings.temperature, self._settings.top_p)
        with torch.inference_mode():
            out: Tensor = self._model.generate(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                logits_processor=LogitsProcessorList([chooser]),
            )
        rows = out[:, width:].tolist()
        return [[self._completion(one, row) for row in rows[n * num : (n + 1) * num]] for n, one in enumerate(ids)]

    def _uniform(self, prompt: Prompt, k: int) -> Float[Tensor, " N"]:
        # On the CPU: another device would have other numbers.
        generator = torch.Generator().manual_seed(prompt.seed(self._settings, k))
        return torch.rand(self._settings.max_new_tokens, generator=generator, dtype=torch.float64)

    def _completion(self, prompt: Ids, row: list[int]) -> Completion:
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        said = self._decoded([*prompt, *row[:end]])
        asked = self._decoded(prompt)
        # Some tokenizers leave out the space that a text begins with, so it is decoded behind its prompt.
        text = said[len(asked) :] if said.startswith(asked) else self._decoded(row[:end])
        return Completion(text, end is None)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template ends an answer with: what a model trained with it ends with."""
    asked, answer = [{"role": "user", "content": "u"}], "a"
    try:
        before = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        whole = [*asked, {"role": "assistant", "content": answer}]
        text = str(tokenizer.apply_chat_template(whole, tokenize=False))
    # There is none, or it wants a conversation of another kind.
    except Exception:
        return None
    rest = text.removeprefix(before).lstrip().removeprefix(answer)
    ids = tokenizer(rest, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return ids[0] if len(rest) < len(text) and ids and ids[0] in special else None
