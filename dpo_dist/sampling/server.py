"""Completions by an OpenAI-compatible server: one request for each, so that each has its own seed and is kept."""

from collections.abc import Callable, Sequence
from functools import partial

from dpo_dist.sampling.client import Client, all_of, text_of
from dpo_dist.sampling.journal import Completion, Journal
from dpo_dist.sampling.prompts import Prompt, Settings


def sample_from_server(
    client: Client,
    model: str,
    prompts: Sequence[Prompt],
    settings: Settings,
    journal: Journal,
    num_at_once: int,
    told: Callable[[int], None],
) -> None:
    """Ask for all completions that the journal lacks.

    Args:
        client: the server.
        model: the name that it knows the model by.
        prompts: strings go to `completions`, conversations to `chat/completions`.
        settings: how to sample.
        journal: gets each completion as it comes.
        num_at_once: requests at a time.
        told: is given the number of completions that have come.
    Raises:
        ConfigError: the server does not answer.
    """

    def ask(prompt: Prompt, key: str, k: int) -> None:
        body = {
            "model": model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": prompt.seed(settings, k),
        }
        if isinstance(prompt.text, str):
            choice = client.post("completions", {**body, "prompt": prompt.text})
        else:
            choice = client.post("chat/completions", {**body, "messages": list(prompt.text)})
        completion = Completion(text_of(choice) or "", choice.get("finish_reason") == "length")
        journal.add_completions([(key, k, completion)])

    calls: list[Callable[[], None]] = []
    for prompt in prompts:
        key = prompt.key(settings)
        there = journal.completions[key]
        calls += [partial(ask, prompt, key, k) for k in range(settings.num_completions) if k not in there]
    all_of(calls, num_at_once, told)
