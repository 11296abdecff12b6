"""Which rates of the kit's report stand beside no share of a ceiling."""

from collections.abc import Iterator
from typing import Any

RATES = ("per_second", "tflops")  # what the keys of rates end with


def rates_alone(values: Any, place: str = "") -> Iterator[str]:
    """Places in a section with a rate and no number for its share."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return
    shares = [value for key, value in values.items() if "share_of_" in str(key)]
    if any(str(key).endswith(RATES) for key in values) and not (shares and all(isinstance(s, float) for s in shares)):
        yield place
    for key, value in values.items():
        yield from rates_alone(value, f"{place}/{key}")
