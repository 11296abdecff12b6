"""The completions of a prompt as a row that training reads."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.sampling.journal import Journal
from dpo_dist.sampling.prompts import Prompt, Settings


@dataclass(frozen=True)
class Group:
    """A prompt and its completions that say something, each once."""

    prompt: Prompt
    key: str
    texts: list[str]
    num_empty: int
    num_cut: int

    @classmethod
    def of(cls, prompt: Prompt, settings: Settings, journal: Journal) -> "Group":
        """What the journal has of a prompt."""
        key = prompt.key(settings)
        found = [completion for _, completion in sorted(journal.completions[key].items())]
        said = [completion.text for completion in found if completion.text.strip()]
        # Many chat templates trim what is said.
        once = {text if isinstance(prompt.text, str) else text.strip(): text for text in reversed(said)}
        num_cut = sum(completion.is_cut for completion in found)
        return cls(prompt, key, list(reversed(once.values())), len(found) - len(said), num_cut)

    def row(self, scores: list[float] | None) -> dict[str, Any]:
        """As training reads it.

        Args:
            scores: of the completions, more is better; None: there are none yet.
        """
        text = self.prompt.text
        if isinstance(text, str):
            row: dict[str, Any] = {"prompt": text, "completions": self.texts}
        else:
            answers = [[{"role": "assistant", "content": one}] for one in self.texts]
            row = {"prompt": list(text), "completions": answers}
        return row if scores is None else {**row, "scores": scores}
