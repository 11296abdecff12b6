"""Markdown pages as tests read them: code blocks, headings, commands; and what the package can say."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|(?<=\n\n))((?: {4}[^\n]*\n|\n(?= {4}))+)")
MIN_FIXED = 14  # characters that a text has beside its placeholders; with fewer it would allow anything
PROSE = 5  # words, from which on what stands in place of a placeholder must be quoted as well


@dataclass(frozen=True)
class Block:
    """A code block, and what it is marked as; an indented one cannot be marked."""

    kind: str
    text: str


def without_fences(text: str) -> str:
    """The page without its fenced blocks."""
    return FENCED.sub("\n", text)


def blocks(text: str) -> list[Block]:
    """All code blocks of a page."""
    fenced = [Block(kind, body) for kind, body in FENCED.findall(text)]
    bodies = (re.sub("^    ", "", body, flags=re.MULTILINE) for body in INDENTED.findall(without_fences(text)))
    return fenced + [Block("yaml" if body.startswith("# ") and ".yaml" in body[:40] else "", body) for body in bodies]


def prose(text: str) -> str:
    """The page without its code blocks."""
    return INDENTED.sub("\n", without_fences(text))


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every line in blocks that may hold commands."""
    for block in blocks(text):
        if block.kind in ("", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)


def own_arguments(words: list[str]) -> tuple[int, list[str]] | None:
    """Where `dpo-dist` or `-m dpo_dist` stands in a command line, and its arguments."""
    for place, word in enumerate(words):
        if word == "dpo-dist" or (word == "dpo_dist" and words[place - 1] in ("-m", "--module")):
            rest = words[place + 1 :]
            end = next((k for k, other in enumerate(rest) if other in ("&&", "|", ";")), len(rest))
            return place, rest[:end]
    return None


# ---- messages


@cache
def templates() -> tuple[re.Pattern[str], ...]:
    """Every longer text of the package, as a pattern of what it can become; docstrings are left out."""
    found: set[str] = set()
    for path in (ROOT / "dpo_dist").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        skipped = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        skipped |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in skipped:
                fixed = _fixed_parts(node)
                if sum(map(len, fixed)) >= MIN_FIXED:
                    found.add("(.*?)".join(map(re.escape, fixed)))
    return tuple(re.compile(pattern) for pattern in sorted(found))


def _fixed_parts(node: ast.JoinedStr | ast.Constant) -> list[str]:
    """The text between placeholders; the space at the end is left out, for a message is shown without it."""
    parts, fixed = node.values if isinstance(node, ast.JoinedStr) else [node], [""]
    for part in parts:
        if not isinstance(part, ast.Constant):
            fixed.append("")
        elif isinstance(part.value, str):
            fixed[-1] += part.value
    return [*fixed[:-1], fixed[-1].rstrip()]


def is_quoted(text: str) -> bool:
    """Whether the package can say this, as far as its texts tell; prose in a placeholder's place is looked up, too."""
    matches = (template.fullmatch(text) for template in templates())
    return any(
        all(len(value.split()) < PROSE or (value != text and is_quoted(value)) for value in match.groups())
        for match in matches
        if match
    )
