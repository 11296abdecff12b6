"""Completions of a model for each prompt, ranked by a judge or a reward model: data that the next round trains on.

    prompts.py    rows of any kind                 prompts, each once
    journal.py    completions and scores so far    a file that grows line by line
    generation.py prompts                          completions, by transformers
    client.py     a request                        what an OpenAI-compatible server answers
    server.py     prompts                          completions, by such a server
    judging.py    completions of a prompt          scores, by such a server
    rewarding.py  the same                         scores, by a reward model in this process
    rows.py       both                             a row that training reads

A completion depends on its prompt, its number among the prompt's completions, and the settings.
"""

from dpo_dist.sampling.client import Client
from dpo_dist.sampling.generation import LocalSampler, prompt_ids
from dpo_dist.sampling.journal import Completion, Journal
from dpo_dist.sampling.judging import judge
from dpo_dist.sampling.prompts import Prompt, Settings, read_prompts
from dpo_dist.sampling.rows import Group
from dpo_dist.sampling.server import sample_from_server

__all__ = [
    "Client",
    "Completion",
    "Group",
    "Journal",
    "LocalSampler",
    "Prompt",
    "Settings",
    "judge",
    "prompt_ids",
    "read_prompts",
    "sample_from_server",
]
