"""A judge that is a rule, for examples: which answer ends with a full stop, and which of two that do is the shorter.

    python -m tests.full_stop_judge [PORT]

It speaks OpenAI's protocol and knows nothing about the world. Whoever reads the answers can check its verdicts.
"""

import sys
import threading
from typing import Any

from tests.openai_server import serving, shown_to_judge

PORT = 8000


def verdict(path: str, body: dict[str, Any]) -> str:
    """An answer that ends with a full stop is better than one that does not; of two that do, the shorter."""
    first, second = (answer.strip() for answer in shown_to_judge(body))
    if first.endswith(".") != second.endswith("."):
        return "A" if first.endswith(".") else "B"
    if not first.endswith(".") or len(first) == len(second):
        return "TIE"
    return "A" if len(first) < len(second) else "B"


if __name__ == "__main__":
    with serving(verdict, int(sys.argv[1]) if len(sys.argv) > 1 else PORT) as server:
        print(f"judging at {server.url} until Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
