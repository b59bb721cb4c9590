"""Predicted against published speed as one SVG: a point for each run, by kind of processor, both axes logarithmic."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from tests.benchmarks.picture import STYLE
from tests.benchmarks.scores import Scored

WIDTH, HEIGHT = 920, 470
TOP, BOTTOM, LEFT, GAP = 70, 404, 64, 40
COLOURS = {
    "cpu": "#0969da", "metal": "#bc4c00", "opencl": "#8250df", "npu": "#1a7f37", "gpu": "#bf8700", "cuda": "#cf222e",
}  # fmt: skip
TITLES = {
    "cpu": "CPU", "metal": "GPU, Metal", "opencl": "GPU, OpenCL", "npu": "NPU", "gpu": "GPU, other",
    "cuda": "GPU, CUDA",
}  # fmt: skip


def scatter(panels: Sequence[tuple[str, str, Sequence[Scored]]]) -> str:
    """Return the SVG of panels: a title, what is drawn (`decode` or `prefill`), and the rows."""
    width = (WIDTH - LEFT - GAP * len(panels)) / len(panels)
    parts = _legend(panels)
    for place, (title, part, scored) in enumerate(panels):
        parts += _panel(title, part, scored, LEFT + place * (width + GAP), width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Predicted against published tokens a second">\n<style>{STYLE}'
        + "".join(f".{kind} {{ fill: {colour}; fill-opacity: .75; }}\n" for kind, colour in COLOURS.items())
        + f'</style>\n<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _legend(panels: Sequence[tuple[str, str, Sequence[Scored]]]) -> list[str]:
    kinds = {one.row.work.kind for _, _, scored in panels for one in scored}
    parts, left = [f'<text class="title" x="{LEFT}" y="22">Tokens/s, each chip predicted from the others</text>'], 420
    for kind, title in TITLES.items():
        if kind in kinds:
            parts.append(
                f'<circle class="{kind}" cx="{left}" cy="18" r="4"/><text x="{left + 8}" y="22">{title}</text>'
            )
            left += 28 + 6 * len(title)
    return parts


def _panel(title: str, part: str, scored: Sequence[Scored], left: float, width: float) -> list[str]:
    points = [(_published(one, part), one) for one in scored]
    values = [value for real, one in points for value in (real, real * one.predicted)]
    low, high = floor(log10(min(values))), ceil(log10(max(values)))

    def at(value: float) -> float:
        return (log10(value) - low) / (high - low)

    parts = [f'<text class="title" x="{left:.1f}" y="{TOP - 14}">{escape(title)}</text>']
    for decade in range(low, high + 1):
        x, y = left + at(10.0**decade) * width, BOTTOM - at(10.0**decade) * (BOTTOM - TOP)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{left + width:.1f}M{x:.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text class="end" x="{left - 6:.1f}" y="{y + 4:.1f}">{10.0**decade:g}</text>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{BOTTOM + 16}">{10.0**decade:g}</text>')
    parts.append(f'<path class="line" d="M{left:.1f} {BOTTOM}L{left + width:.1f} {TOP}"/>')
    for real, one in points:
        x, y = left + at(real) * width, BOTTOM - at(real * one.predicted) * (BOTTOM - TOP)
        told = f"{one.row.device}, {one.row.work.format}: published {real:g}, predicted {real * one.predicted:.3g}"
        circle = f'<circle class="{one.row.work.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
        parts.append(f"{circle}<title>{escape(told)}</title></circle>")
    middle = left + width / 2
    return [*parts, f'<text class="middle" x="{middle:.1f}" y="{BOTTOM + 36}">published; upwards: predicted</text>']


def _published(one: Scored, part: str) -> float:
    return one.row.decode if part == "decode" else one.row.prefill
