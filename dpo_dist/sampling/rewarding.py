"""Scores by a reward model in this process: a language model with one number for a whole conversation.

Ouyang et al. 2022, "Training language models to follow instructions", arXiv:2203.02155, section 3.5. What it reads is
rendered as TRL's RewardTrainer and RewardBench do: the whole conversation, by the reward model's own chat template.

    N conversations   L tokens of the longest one
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from dpo_dist.data.example import Messages
from dpo_dist.errors import DataError, ModelError, NumericsError
from dpo_dist.pretrained import first_line, raise_if_own_code
from dpo_dist.sampling.generation import Ids
from dpo_dist.sampling.prompts import Prompt
from dpo_dist.tokenization.encode import leading_ids

KEY = "--reward-model"


def require_reward_model(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Find mistakes before anything is sampled.

    Args:
        folder: of the reward model.
        config: what `load_config` gave.
        tokenizer: its own.
        prompts: of which completions will be scored.
    Raises:
        ModelError: it has several labels; or there are messages, and no chat template.
    """
    if config.num_labels != 1:
        raise ModelError(
            f"{KEY}={folder} has {config.num_labels} labels, and a score is one number; give a model with num_labels=1 "
            "(AutoModelForSequenceClassification), such as TRL's RewardTrainer makes"
        )
    if not tokenizer.chat_template and any(not isinstance(prompt.text, str) for prompt in prompts):
        raise ModelError(
            f"{KEY}={folder} has no chat template, and the prompts are messages; give a reward model of conversations, "
            "or --text if the prompts are strings that the model goes on with"
        )


def conversation_ids(
    prompt: Prompt,
    completions: Sequence[str],
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Ids]:
    """What the reward model reads: whole conversations, or prompt and completion as one string with an end.

    Args:
        prompt: a string or messages.
        completions: of it.
        folder, config, tokenizer: of the reward model.
    Raises:
        DataError: the chat template refuses the conversation, or it is longer than the model reads.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    found: list[Ids] = []
    for completion in completions:
        if isinstance(prompt.text, str):
            ids = _text_ids(prompt.text + completion, tokenizer)
        else:
            rendered = _rendered(prompt.source, prompt.text, completion, folder, tokenizer)
            ids = _ids(rendered, tokenizer)
        if isinstance(longest, int) and len(ids) > longest:
            raise DataError(
                f"{prompt.source}: {KEY}={folder}: a completion with its prompt has {len(ids)} tokens, and the model "
                f"reads {longest}; lower --max-new-tokens and give another --out, or leave this row out: what was "
                "sampled of the others stays"
            )
        found.append(ids)
    return found


def _rendered(source: str, prompt: Messages, completion: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    conversation = [*map(dict, prompt), {"role": "assistant", "content": completion}]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False))
    # It may raise anything on a conversation that it does not expect.
    except Exception as error:
        raise DataError(
            f"{source}: the chat template of {KEY}={folder} refuses the conversation ({first_line(error)}); leave this "
            "row out, or give another reward model: what was sampled stays"
        ) from error


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    # Truncation and padding are switched off by name: a tokenizer.json may have them on.
    return tuple(tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"])


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    ids, leading = _ids(text, tokenizer), leading_ids(tokenizer)
    end: Any = tokenizer.eos_token_id
    if ids[: len(leading)] != leading:
        ids = leading + ids
    return ids if end is None or ids[-1:] == (end,) else (*ids, end)


class RewardModel:
    """A model on the device that is there.

    Args:
        folder: of the model.
        trust_remote_code: run code that lies in the folder.
    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        self._folder = folder
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        # Whatever a folder lacks, transformers says it in its own way.
        except Exception as error:
            raise_if_own_code(error, f"{KEY}={folder}", "--trust-remote-code")
            raise ModelError(f"{KEY}={folder} cannot be loaded ({first_line(error)}); give a whole model") from error
        self._model, report = loaded
        if missing := sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ())):
            raise ModelError(
                f"{KEY}={folder} lacks {len(missing)} weights of its architecture, such as {missing[0]}; they would be "
                "random numbers. Give a model that was trained to score"
            )
        self._model.to(self._device).eval()

    def scores(self, ids: Sequence[Ids]) -> list[float]:
        """One number for each of N conversations, more is better; computed in one batch, in which padding is unseen.

        Equals:
            The model's own forward of each conversation alone, but for the order in which floats are added up.
        Raises:
            NumericsError: one is not finite.
        """
        config = self._model.config.get_text_config()
        own = config.pad_token_id
        pad = own
        if own is None and len(ids) > 1:
            # The class scores the last token that is no padding: it must not take any of these for it.
            present = {token for one in ids for token in one}
            pad = next(token for token in range(len(present) + 1) if token not in present)
            if pad >= config.vocab_size:
                return [score for one in ids for score in self.scores([one])]
        width = max(map(len, ids))
        input_ids_NL = torch.tensor([[*one, *[pad] * (width - len(one))] for one in ids], device=self._device)
        mask_NL = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=self._device)
        try:
            config.pad_token_id = pad
            with torch.inference_mode():
                found = self._model(input_ids=input_ids_NL, attention_mask=mask_NL).logits
        finally:
            config.pad_token_id = own
        scores = found.float().reshape(len(ids), -1)[:, 0]
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                f"{KEY}={self._folder}: a score is not finite; give the model in another number format, or another one"
            )
        return scores.tolist()
