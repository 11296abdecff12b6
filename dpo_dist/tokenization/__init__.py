"""An example as token ids: chat template, truncation, completion spans.

    tokenizer.py  load a tokenizer; what identifies it
    conversation.py messages               text, by a chat template; what it leaves out
    text_ids.py   texts                    token ids
    encode.py     text examples            TokenizedExample or RowFault
    given.py      a completion            which of its turns are not the assistant's
    turns.py      token ids               which are learned
    truncation.py a prompt that is too long the end of it
    row_encoder.py rows as they are read   what each became
    processes.py the same                  by several processes, in order
    worker.py    one of them
    notes.py      what a user should know  a line for each
    grouping.py   rows of one prompt       one example
    ratings.py    rows called good or bad  pairs, by prompt
    gathering.py  what of that applies     to a source
    bad_rows.py   rows without use         counts, and a message
    writing.py    rows of all sources     one folder, gone on from where it was left (journal.py)
    stored.py     what was written        tokenised examples
    summary.py    a finished folder       what is in it, and whether it is whole
    writer.py     tokenised examples       Arrow file and its summary
    dataset.py    the same, memory-mapped  any row in constant time
    progress.py   what a user sees of that a bar, or a line now and then
    prepare.py    entries of data.train    one TokenizedDataset, tokenised once and found again

Rows that hold token ids already pass through unchanged, and no tokenizer is loaded for them. Needs no process group.
"""

from dpo_dist.tokenization.dataset import Sample, TokenizedDataset
from dpo_dist.tokenization.encode import Encoder, TokenizedExample
from dpo_dist.tokenization.notes import MERGED, describe_notes
from dpo_dist.tokenization.prepare import prepare_dataset, repeated_data
from dpo_dist.tokenization.tokenizer import TokenizerSpec, load_tokenizer

__all__ = [
    "MERGED",
    "Encoder",
    "Sample",
    "TokenizedDataset",
    "TokenizedExample",
    "TokenizerSpec",
    "describe_notes",
    "load_tokenizer",
    "prepare_dataset",
    "repeated_data",
]
