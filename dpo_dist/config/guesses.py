"""What a misspelt name was meant to be, or nothing: a wrong guess sends the reader the wrong way."""

from collections.abc import Iterable

# A wrong character is less often a slip than one too many, one too few, or two that changed places: `grpo` is no
# `orpo`, and `los` is rather `loss` than `log`.
_WRONG_CHARACTER = 1.5
# What the mistakes of a name of so many characters may cost; a shorter one may hold none.
_ALLOWED = ((12, 2.5), (6, 1.5), (3, 1.0))


def guess(word: str, known: Iterable[str]) -> str | None:
    """The one known name that `word` misspells.

    Equal but for case and separators (`outputDir`), or as few slips away as its length allows. None where nothing is
    near, or several names are equally near.

    Args:
        word: what the user wrote.
        known: the names there are.
    """
    names = list(dict.fromkeys(known))
    alike = [name for name in names if _plain(name) == _plain(word)]
    if len(alike) == 1:
        return alike[0]
    allowed = next((cost for length, cost in _ALLOWED if len(word) >= length), 0.0)
    distance = {name: _distance(word.lower(), name.lower()) for name in names}
    nearest = min(distance.values(), default=allowed + 1)
    found = [name for name in names if distance[name] == nearest]
    return found[0] if nearest <= allowed and len(found) == 1 else None


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _distance(first: str, second: str) -> float:
    """Least cost of insertions, deletions, replacements and swaps of neighbours that make one of the other."""
    rows = [[float(j) for j in range(len(second) + 1)]]
    for i, left in enumerate(first, start=1):
        row = [float(i)]
        for j, right in enumerate(second, start=1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + _WRONG_CHARACTER * (left != right))
            if i > 1 and j > 1 and left == second[j - 2] and right == first[i - 2]:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]
