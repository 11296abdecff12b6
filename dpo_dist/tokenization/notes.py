"""Rows that are used, and that the user should know about: counted in `TokenizedDataset.notes`."""

PROMPT_NOT_A_PREFIX = "prompt_not_a_prefix"
BOUNDARY_MERGED = "boundary_merged"
TRUNCATED = "truncated"
SHORTENED = "prompt_shortened"
MERGED = "merged_by_prompt"

_MEANINGS = {
    PROMPT_NOT_A_PREFIX: "the chat template renders the prompt in another way once an answer follows; the completion "
    "begins where the two renderings part",
    BOUNDARY_MERGED: "the tokenizer merges text across the border of prompt and completion; the completion was "
    "tokenised on its own",
    TRUNCATED: "completions were cut at data.max_length, without an end-of-sequence token",
    SHORTENED: "the beginning of the prompt was left out, because of data.max_length: whole turns of a conversation, "
    "tokens of any other prompt",
    MERGED: "the row became part of an earlier one with the same prompt (data.group_by_prompt)",
}


def describe_notes(notes: dict[str, int], num_examples: int) -> list[str]:
    """A line for each note: how many rows, their share, what it means.

    Args:
        notes: rows by note.
        num_examples: of the whole data set, each made of one row or, by prompt, of several.
    """
    num_rows = num_examples + notes.get(MERGED, 0)
    return [
        f"{count:,} of {num_rows:,} rows ({100 * count / num_rows:.3g} %): {note}: {_MEANINGS[note]}"
        for note, count in notes.items()
    ]
