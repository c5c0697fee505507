"""Right answers by length and depth: a small map per method, as SVG drawn by hand."""

from collections.abc import Sequence
from html import escape

import numpy as np

from kvist.evaluate.maps import grid
from kvist.report.load import Entry
from kvist.report.look import look

CELL, WIDE, TALL, LEFT, TOP, BOTTOM = 30, 114, 19, 30, 20, 16
# from nothing to everything: dark to light is read as few to many in print, too
SCALE = ((68, 30, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def colour(share: float) -> str:
    """Of a share of right answers, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    i = min(int(place), len(SCALE) - 2)
    mixed = (a + (b - a) * (place - i) for a, b in zip(SCALE[i], SCALE[i + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def draw(entry: Entry, mark: str = "") -> str:
    """One map: depths from above, lengths from the left, percent right in each cell."""
    lengths, depths, scores = grid(entry.cell)
    wide = max(CELL, WIDE // len(lengths))
    width, height = LEFT + wide * len(lengths) + 2, TOP + TALL * len(depths) + BOTTOM
    name, mean = look(entry.method).label, float(np.mean(entry.cell.values["score"]))
    parts = [
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(name)}: {100 * mean:.0f} % right">',
        f'<text x="{LEFT}" y="12" class="name" style="fill:{_ink(name)}">{escape(_cut(name, width - LEFT))}</text>',
        f'<text x="{width - 2}" y="12" class="mean">{100 * mean:.0f}{mark}</text>',
    ]
    for i, depth in enumerate(depths):
        y = TOP + TALL * i
        said = "any" if depth is None else f"{100 * depth:.0f}"
        parts.append(f'<text x="{LEFT - 4}" y="{y + 13}" class="tick end">{said}</text>')
        for j in range(len(lengths)):
            share = scores[i, j]
            if np.isnan(share):
                continue
            x, dark = LEFT + wide * j, share < 0.62
            parts.append(
                f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{TALL - 1}" fill="{colour(share)}"/>'
                f'<text x="{x + wide / 2:.0f}" y="{y + 13}" class="in" style="fill:{"#fff" if dark else "#222"}">'
                f"{100 * share:.0f}</text>"
            )
    for j, length in enumerate(lengths):
        x = LEFT + wide * j + wide / 2
        parts.append(f'<text x="{x:.0f}" y="{TOP + TALL * len(depths) + 12}" class="tick mid">{length:,}</text>')
    return "".join([*parts, "</svg>"])


def scale() -> str:
    """The colours, as a strip with its ends named."""
    steps = "".join(f'<rect x="{12 * i}" y="0" width="12" height="9" fill="{colour(i / 10)}"/>' for i in range(11))
    ends = '<text x="-4" y="9" class="tick end">0</text><text x="137" y="9" class="tick">100 %</text>'
    return f'<svg class="scale" viewBox="-14 0 190 10" width="190" height="10" aria-hidden="true">{steps}{ends}</svg>'


def deep(entries: Sequence[Entry]) -> bool:
    """Whether there is more to draw than a mean per length."""
    return all({"length", "depth", "score"} <= entry.cell.values.keys() for entry in entries) and any(
        depth is not None for depth in entries[0].cell.values["depth"]
    )


def _ink(method: str) -> str:
    seen = look(method).colour
    return "currentColor" if method == "exact" else seen


def _cut(name: str, width: float) -> str:
    most = int((width - 30) / 6.3)  # beside the mean
    return name if len(name) <= most else name[: most - 1] + "…"
