"""What the decoder is handed for a micro-batch: its tokens, or its tokens with virtual ones before every prompt.

Virtual tokens (prompt learning) are the beginning of every prompt, so packing and shared prompts stay as they are: as
embeddings they stand once before each prompt; as keys and values of every layer (prefix tuning) they stand once, in
front of everything, and every segment reads them first.

    T packed tokens   P virtual tokens   M scored tokens   D model dimension
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_dist.batch import AttentionLayout, MicroBatch, build_layout


@dataclass(frozen=True)
class Packed:
    """The decoder's arguments, its layout, and where its answer is scored."""

    inputs: dict[str, Any]
    layout: AttentionLayout
    score_index_M: Tensor


def as_packed(batch: MicroBatch) -> Packed:
    """The micro-batch's own tokens."""
    inputs = {"input_ids": batch.input_ids_T[None], "position_ids": batch.position_ids_T[None]}
    return Packed(inputs, batch.layout, batch.score_index_M)


def with_virtual_embeddings(batch: MicroBatch, embeddings_TD: Tensor, virtual_PD: Tensor) -> Packed:
    """The micro-batch's tokens, and before every prompt the virtual tokens, at positions 0, 1, ..., P - 1.

    Args:
        batch: what is scored.
        embeddings_TD: of its tokens.
        virtual_PD: the virtual tokens.
    """
    count, num_tokens = len(virtual_PD), len(embeddings_TD)
    layout = batch.layout
    starts, prompt_of = _prompts(layout)
    opening = torch.zeros(num_tokens, dtype=torch.int64)
    opening[torch.tensor(starts)] = 1
    place_T = torch.arange(num_tokens) + count * opening.cumsum(0)  # where each token now is
    q_lengths = [length + count * own for length, own in zip(layout.q_lengths, _own_prompt(layout), strict=True)]
    keys: list[int] = []
    for segment, prompt in enumerate(prompt_of):
        first = int(place_T[starts[prompt]])
        keys += range(first - count, first)
        keys += place_T[_keys(layout, segment)].tolist()
    k_lengths = [length + count for length in layout.k_lengths]
    total = num_tokens + count * len(starts)
    source = torch.arange(num_tokens, num_tokens + count).repeat(total // count + 1)[:total]
    position = torch.zeros(total, dtype=torch.int64)
    for start in starts:
        first = int(place_T[start])
        source[first - count : first] = torch.arange(num_tokens, num_tokens + count)
        position[first - count : first] = torch.arange(count)
    source[place_T] = torch.arange(num_tokens)
    device = embeddings_TD.device
    place_T, position = place_T.to(device), position.to(device)
    position[place_T] = batch.position_ids_T + count
    both = torch.cat([embeddings_TD, virtual_PD.to(embeddings_TD.dtype)])[source.to(device)]
    inputs = {"inputs_embeds": both[None], "position_ids": position[None]}
    moved = _to(build_layout(q_lengths, k_lengths, keys, total), device)
    return Packed(inputs, moved, place_T[batch.score_index_M])


def with_virtual_keys(batch: MicroBatch, count: int, cache: Any) -> Packed:
    """The micro-batch's tokens, which all see `count` keys and values of a cache before their own.

    Args:
        batch: what is scored.
        count: P.
        cache: transformers' cache of every layer, one sequence of P tokens.
    """
    layout = batch.layout
    keys: list[int] = []
    for segment in range(len(layout.q_lengths)):
        keys += range(count)
        keys += (_keys(layout, segment) + count).tolist()
    k_lengths = [length + count for length in layout.k_lengths]
    widened = build_layout(layout.q_lengths, k_lengths, keys, count + len(batch.input_ids_T))
    inputs = {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.position_ids_T[None] + count,
        "past_key_values": cache,
    }
    return Packed(inputs, _to(widened, batch.input_ids_T.device), batch.score_index_M)


def _own_prompt(layout: AttentionLayout) -> list[bool]:
    """Whether a segment's queries begin with its prompt, or it reads another one's."""
    return [q == k for q, k in zip(layout.q_lengths, layout.k_lengths, strict=True)]


def _prompts(layout: AttentionLayout) -> tuple[list[int], list[int]]:
    """The token each prompt begins at, and which prompt each segment reads."""
    starts: list[int] = []
    prompt_of: list[int] = []
    query = 0
    for length, owns in zip(layout.q_lengths, _own_prompt(layout), strict=True):
        if owns:
            starts.append(query)
        prompt_of.append(len(starts) - 1)
        query += length
    return starts, prompt_of


def _keys(layout: AttentionLayout, segment: int) -> Tensor:
    """The tokens that are a segment's keys, on the CPU."""
    first = sum(layout.k_lengths[:segment])
    last = first + layout.k_lengths[segment]
    return torch.arange(first, last) if layout.kv_index_U is None else layout.kv_index_U[first:last].cpu()


def _to(layout: AttentionLayout, device: torch.device) -> AttentionLayout:
    if device.type == "cpu":
        return layout
    moved = {name: value.to(device) for name, value in vars(layout).items() if isinstance(value, Tensor)}
    return AttentionLayout(**{**vars(layout), **moved})
