"""A tokenizer of one token per byte, with a chat template, for tests of what text becomes."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from dpo_dist.tokenization import TokenizerSpec

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, IM_START, IM_END = range(4)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(
    folder: Path, template: str | None = CHATML, *, eos: str | None = "</s>", bos: bool = True
) -> TokenizerSpec:
    """One token per byte, except that two newlines merge; puts <s> before and </s> after a text if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"  # how byte-level BPE writes "\n"
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    # Traps that a tokenizer.json may hold: they must not act.
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=50, pad_id=EOS, pad_token="</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, model_max_length=8)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return TokenizerSpec(str(folder))
