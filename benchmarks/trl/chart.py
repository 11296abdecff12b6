"""Horizontal bars with their spread, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, TOP, BARS, NUMBERS = 26, 44, 420, 190  # pixels
LETTER = 7.6  # pixels, of a label: no letter but m and w is wider


@dataclass(frozen=True)
class Bar:
    """A length with the least and the most that were seen; `emphasis` gives it the other colour."""

    label: str
    median: float
    least: float
    most: float
    emphasis: bool = False


def chart(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """The bars from 0, each with its number; a line shows the spread.

    Args:
        title: above the bars.
        unit: of the numbers.
        bars: from top to bottom.
    """
    longest = max((bar.most for bar in bars), default=0.0) or 1.0
    labels = round(20 + LETTER * max((len(bar.label) for bar in bars), default=0))
    width, height = labels + BARS + NUMBERS, TOP + ROW * len(bars) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="24" font-size="15" font-weight="bold">{escape(f"{title}, {unit}")}</text>',
    ]
    for index, bar in enumerate(bars):
        parts += _drawn(bar, labels, TOP + ROW * index, BARS / longest)
    bottom = TOP + ROW * len(bars)
    parts.append(f'<line x1="{labels}" y1="{TOP - 4}" x2="{labels}" y2="{bottom}" stroke="#333333"/>')
    return "\n".join([*parts, "</svg>", ""])


def _drawn(bar: Bar, left: int, top: float, scale: float) -> list[str]:
    middle, ends = top + ROW / 2 - 2, [left + value * scale for value in (bar.least, bar.median, bar.most)]
    colour = "#1f6fb4" if bar.emphasis else "#9aa5b1"
    text = f"{_number(bar.median)} ({_number(bar.least)} to {_number(bar.most)})"
    return [
        f'<text x="{left - 8}" y="{middle + 5}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect x="{left}" y="{top}" width="{bar.median * scale:.1f}" height="{ROW - 6}" fill="{colour}"/>',
        f'<line x1="{ends[0]:.1f}" y1="{middle}" x2="{ends[2]:.1f}" y2="{middle}" stroke="#111111" stroke-width="2"/>',
        f'<text x="{max(ends[1:]) + 8:.1f}" y="{middle + 5}">{text}</text>',
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
