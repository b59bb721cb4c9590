"""KL against size as one SVG: a panel for each target, ours joined by a line, the opponents as labelled points."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

from tests.benchmarks.rows import Row

WIDTH, HEIGHT = 920, 440
TOP, BOTTOM, LEFT, GAP = 64, 376, 64, 36
TITLES = {"gguf": "GGUF, in llama.cpp", "onnx": "ONNX, in ONNX Runtime"}
KINDS = {
    "ours": "edge exporter",
    "stock": "stock tool",
    "hand-made": "hand-made mix",
    "recipe": "recipe",
    "rival": "rival",
}
# Of text at 11 pixels; labels further from their points than this are joined to them.
LABEL_HEIGHT, LETTER, NEAR = 11, 6.2, 8
MOST_MARKS = 11
# Its own background, so that it can be read on any page; it follows the reader's scheme as a whole.
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #24292f; }
.title { font-size: 13px; font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.paper { fill: #ffffff; } .grid { stroke: #d8dee4; }
.line { stroke: #0969da; fill: none; stroke-width: 2; }
.ours { fill: #0969da; } .stock { fill: #bc4c00; }
.joint { stroke: #6e7781; stroke-width: 0.7; }
.hand-made { fill: none; stroke: #6e7781; stroke-width: 1.5; } .recipe { fill: #8250df; }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3; } .paper { fill: #0d1117; } .grid { stroke: #30363d; } .line { stroke: #58a6ff; }
 .ours { fill: #58a6ff; } .stock { fill: #f0883e; } .hand-made { stroke: #9198a1; }
 .recipe { fill: #bc8cff; }
}
"""


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    x: Callable[[float], float]
    y: Callable[[float], float]


@dataclass(frozen=True)
class Axis:
    """What the horizontal axis shows.

    Attributes:
        title: Of the axis.
        per_byte: How much of it a byte is.
        step: Between two marks; twice that where there would be too many.
    """

    title: str
    per_byte: float
    step: float

    @classmethod
    def bits(cls, parameters: int) -> "Axis":
        """Show total bits for each parameter, as shipped."""
        return cls("bits of the model files as shipped, for each weight", 8 / parameters, 0.5)

    def of(self, row: Row) -> float:
        """Return where a row stands."""
        return row.file_bytes * self.per_byte

    def marks(self, rows: Sequence[Row]) -> list[float]:
        """Return round values from below all rows to above them."""
        sizes = [self.of(row) for row in rows]
        first, last = floor(min(sizes) / self.step - 0.1), ceil(max(sizes) / self.step + 0.1)
        step = 1 if last - first < MOST_MARKS else 2
        return [mark * self.step for mark in range(first - first % step, last + step, step)]


MEGABYTES = Axis("model files, MB (10⁶ bytes)", 1e-6, 5)


def picture(rows: Sequence[Row], axis: Axis = MEGABYTES) -> str:
    """Return the SVG of all rows; the vertical axis is logarithmic and shared."""
    low, high = _decades(row.kl_mean for row in rows)
    targets = [target for target in TITLES if any(row.target == target for row in rows)]
    width = (WIDTH - LEFT - GAP * len(targets)) / len(targets)

    def y(kl: float) -> float:
        return BOTTOM - (log10(kl) - low) / (high - low) * (BOTTOM - TOP)

    marks = [step * 10.0**decade for decade in range(floor(low), ceil(high)) for step in (1, 2, 5)]
    marks = [mark for mark in marks if low <= log10(mark) <= high]
    parts = [f'<text class="end" x="{LEFT - 8}" y="{y(mark) + 4:.1f}">{mark:g}</text>' for mark in marks]
    for place, target in enumerate(targets):
        own = [row for row in rows if row.target == target]
        sizes = axis.marks(own)
        left = LEFT + place * (width + GAP)

        def x(size: float, left: float = left, first: float = sizes[0], last: float = sizes[-1]) -> float:
            return left + (size - first) / (last - first) * width

        parts += _frame(target, axis.title, sizes, marks, Scale(x, y), left, width)
        parts += _points(own, axis, Scale(x, y), left, width)
    label = "Mean KL divergence from the original against the size of the model files"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f'<style>{STYLE}</style>\n<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n'
        + "\n".join([*_legend({row.kind for row in rows}), *parts])
        + "\n</svg>\n"
    )


def _decades(values: Iterable[float]) -> tuple[float, float]:
    """Return the ends of the logarithmic axis: the values' own, with a little room."""
    logarithms = [log10(value) for value in values]
    return min(logarithms) - 0.08, max(logarithms) + 0.08


def _legend(kinds: Collection[str]) -> list[str]:
    parts = [f'<text class="title" x="{LEFT}" y="22">Mean KL from the original, nats a token (less is better)</text>']
    left = WIDTH - GAP - 300
    for kind, title in KINDS.items():
        if kind not in kinds:
            continue
        parts += [_marker(kind, left, 18), f'<text x="{left + 9}" y="22">{title}</text>']
        left += 105
    return parts


def _frame(
    target: str, title: str, sizes: Iterable[float], marks: Iterable[float], scale: Scale, left: float, width: float
) -> list[str]:
    parts = [f'<text class="title" x="{left:.1f}" y="{TOP - 12}">{TITLES[target]}</text>']
    for mark in marks:
        height = f"{scale.y(mark):.1f}"
        parts.append(f'<path class="grid" d="M{left:.1f} {height}H{left + width:.1f}"/>')
    for size in sizes:
        at = f"{scale.x(size):.1f}"
        parts.append(f'<path class="grid" d="M{at} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text class="middle" x="{at}" y="{BOTTOM + 16}">{size:g}</text>')
    middle = left + width / 2
    return [*parts, f'<text class="middle" x="{middle:.1f}" y="{BOTTOM + 36}">{title}</text>']


def _points(rows: Sequence[Row], axis: Axis, scale: Scale, left: float, width: float) -> list[str]:
    ordered = sorted(rows, key=lambda row: (row.file_bytes, row.kl_mean))
    places = [(row, scale.x(axis.of(row)), scale.y(row.kl_mean)) for row in ordered]
    ours = [(x, y) for row, x, y in places if row.kind == "ours"]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in ours)
    parts = [f'<polyline class="line" points="{line}"/>'] if ours else []
    taken = [Box(x - 5, x + 5, y) for _, x, y in places] + _along(ours)
    for row, x, y in places:
        parts.append(_marker(row.kind, x, y, f"{row.name}: {row.file_bytes:,} bytes, KL {row.kl_mean:.4f}"))
    for row, x, y in places:
        if row.kind in ("stock", "recipe", "rival"):
            parts.append(_label(row.name, x, y, (left, left + width), taken))
    return parts


@dataclass(frozen=True)
class Box:
    """What is drawn already: its ends, and the middle of its height, which is that of a label."""

    start: float
    end: float
    y: float

    def meets(self, other: "Box") -> bool:
        """Say whether two overlap."""
        return abs(self.y - other.y) < LABEL_HEIGHT and self.start < other.end and other.start < self.end


def _along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Return small boxes that cover a line, so that no label lies on it."""
    boxes = []
    for (x, y), (further, other) in pairwise(points):
        steps = ceil(max(abs(further - x), abs(other - y)) / LABEL_HEIGHT) or 1
        middles = [(x + (further - x) * at / steps, y + (other - y) * at / steps) for at in range(steps + 1)]
        boxes += [Box(at - 1, at + 1, height) for at, height in middles]
    return boxes


def _label(text: str, x: float, y: float, panel: tuple[float, float], taken: list[Box]) -> str:
    """Return a label at the nearest free place: right of its point or left, then above and below either.

    A label that is not beside its point is joined to it. `taken` is what is drawn already; the label is added to it.
    """
    length = LETTER * len(text)
    for away in range(HEIGHT):
        for side, height in ((1, y - away), (-1, y - away), (1, y + away), (-1, y + away)):
            start = x + 8 if side > 0 else x - 8 - length
            box = Box(start, start + length, height)
            inside = panel[0] <= box.start and box.end <= panel[1] + GAP and TOP <= height <= BOTTOM
            if inside and not any(box.meets(other) for other in taken):
                taken.append(box)
                near, anchor = x + 8 * side, "" if side > 0 else ' class="end"'
                joined = f'<path class="joint" d="M{x:.1f} {y:.1f}L{near:.1f} {height:.1f}"/>' if away > NEAR else ""
                return f'{joined}<text{anchor} x="{near:.1f}" y="{height + 4:.1f}">{escape(text)}</text>'
    raise ValueError(f"there is no room for the label {text}")


def _marker(kind: str, x: float, y: float, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    if kind == "ours":
        return f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="4">{told}</circle>'
    if kind == "stock":
        return f'<rect class="stock" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{told}</rect>'
    if kind == "recipe":
        return f'<path class="recipe" d="M{x:.1f} {y - 5:.1f}l5 9h-10z">{told}</path>'
    return f'<path class="hand-made" d="M{x:.1f} {y - 4:.1f}l4 4 -4 4 -4 -4z">{told}</path>'
