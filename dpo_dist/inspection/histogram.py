"""A histogram as SVG, in the colours of the page that it stands in."""

from html import escape

from dpo_dist.inspection.lengths import Histogram

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 190, 10, 34, 36  # pixels
_LABELS = 5  # numbers below the bars


def drawn(title: str, one: Histogram) -> str:
    """Bars, with the least value of some of them; the last bin says that it has no end.

    Args:
        title: above the bars.
        one: at least one value.
    """
    step = (_WIDTH - 2 * _LEFT) / len(one.counts)
    base, most = _HEIGHT - _BOTTOM, max(one.counts)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="histogram">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_LEFT}" y="18" class="title">{escape(title)}</text>',
    ]
    every = -(-len(one.counts) // _LABELS)
    for place, count in enumerate(one.counts):
        left, height = _LEFT + step * place, (base - _TOP) * count / most
        begin = place * one.width
        end = f"{begin + one.width - 1:,}" if place + 1 < len(one.counts) else f"{one.largest:,}"
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{base - height:.1f}" width="{max(1.0, step - 2):.1f}" '
            f'height="{height:.1f}"><title>{begin:,} to {end}: {count:,}</title></rect>'
        )
        if place % every == 0:
            parts.append(f'<text x="{left:.1f}" y="{base + 16}">{begin:,}</text>')
    parts.append(f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _LEFT}" y2="{base}"/>')
    parts.append(f'<text x="{_LEFT}" y="{base + 31}" class="quiet">tokens; the longest has {one.largest:,}</text>')
    return "\n".join([*parts, "</svg>"])
