"""JSON whose numbers can be computed with: a damaged or foreign file is refused here, not where it is used."""

import json
import math
from typing import Any

_MAX_INTEGER = 2**63


def parse(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, is nested without end, or has a number that is not finite or wider than 64 bits.
    """
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_float, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _integer(text: str) -> int:
    # By its length first: Python refuses to read thousands of digits, in words about itself.
    if len(text) > 20 or abs(value := int(text)) >= _MAX_INTEGER:
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _not_finite(text: str) -> Any:
    raise ValueError(f"the number {_short(text)} is not finite")


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."
