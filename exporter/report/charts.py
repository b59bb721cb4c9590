"""Pictures of a report as inline SVG: where the bytes are, and how many bits each layer's weights have.

They carry no text, so that they may stretch to any width; the page labels them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.data import TensorRow

ROLE_TITLES = {
    "embedding": "Embedding",
    "layer_embedding": "Inputs of layers",
    "head": "Head",
    "q": "Query",
    "k": "Key",
    "v": "Value",
    "o": "Attention output",
    "conv_in": "Convolution input",
    "conv_out": "Convolution output",
    "gate": "Gate",
    "up": "Up",
    "down": "Down",
    "input_gate": "Gate of a layer's input",
    "input_projection": "Projection of a layer's input",
}
EXPERT_TITLES = {
    "router": "Router",
    "expert_gate": "Gates of experts",
    "expert_up": "Ups of experts",
    "expert_down": "Downs of experts",
}
# Upper ends of the steps of the colour scale, in bits per weight; the last step has none.
BIT_STEPS = (3.0, 4.0, 5.0, 6.0, 9.0)
STEP_TITLES = ("under 3", "3 to 4", "4 to 5", "5 to 6", "6 to 9", "9 and more")


@dataclass(frozen=True)
class Share:
    """What one role takes of the model files; `tone` names its colour."""

    title: str
    tone: str
    stored_bytes: int
    fraction: float
    bits_per_weight: float | None


@dataclass(frozen=True)
class Strip:
    """Bits per weight of one role from layer to layer."""

    title: str
    svg: Markup


def role_title(role: str) -> str:
    """Return a role as people read it."""
    return (ROLE_TITLES | EXPERT_TITLES).get(role, role)


def mean_bits(rows: Sequence[TensorRow]) -> float:
    """Return stored bits for each weight over several matrices; 0 where they hold none."""
    weights = sum(row.rows * row.columns for row in rows)
    return 8 * sum(row.stored_bytes for row in rows) / weights if weights else 0.0


def shares(rows: Sequence[TensorRow], file_bytes: int) -> list[Share]:
    """Return what each role takes, in order of appearance, and what the files hold besides matrices."""
    total = max(file_bytes, sum(row.stored_bytes for row in rows), 1)
    found = []
    for role in dict.fromkeys(row.role for row in rows):
        own = [row for row in rows if row.role == role]
        stored = sum(row.stored_bytes for row in own)
        found.append(Share(role_title(role), _tone(role), stored, stored / total, mean_bits(own)))
    rest = total - sum(share.stored_bytes for share in found)
    if file_bytes and rest > 0:
        found.append(Share("Everything else", "rest", rest, rest / total, None))
    return found


def _tone(role: str) -> str:
    bare = role.removeprefix("expert_")
    return bare if bare in ROLE_TITLES else "other"


def stacked_bar(parts: Sequence[Share]) -> Markup:
    """Return one bar, parts side by side in proportion."""
    cells, left = [], 0.0
    for part in parts:
        width = 1000 * part.fraction
        cells.append(
            Markup('<rect class="tone-{}" x="{}" width="{}" height="1"><title>{}</title></rect>').format(
                part.tone, f"{left:.2f}", f"{width:.2f}", f"{part.title}: {part.stored_bytes:,} bytes"
            )
        )
        left += width
    return _svg("bar", 1000, "Bytes by role", cells)


def heat_strips(rows: Sequence[TensorRow]) -> list[Strip]:
    """Return a strip for each role that occurs in layers: a cell for each layer, its tone by bits per weight.

    The experts of a layer have one cell: they share a format.
    """
    inside = list({(row.role, row.layer): row for row in rows if row.layer is not None}.values())
    layers = 1 + max((row.layer for row in inside if row.layer is not None), default=-1)
    return [
        Strip(role_title(role), _strip(role, [row for row in inside if row.role == role], layers))
        for role in dict.fromkeys(row.role for row in inside)
    ]


def _strip(role: str, rows: Sequence[TensorRow], layers: int) -> Markup:
    cells = [
        Markup('<rect class="step-{}" x="{}.05" width="0.9" height="1"><title>{}</title></rect>').format(
            bisect_right(BIT_STEPS, row.bits_per_weight),
            row.layer,
            f"layer {row.layer}: {row.format}, {row.bits_per_weight:.2f} bits per weight",
        )
        for row in rows
    ]
    return _svg("strip", layers, f"Bits per weight of {role_title(role)} by layer", cells)


def steps_used(rows: Sequence[TensorRow]) -> list[tuple[int, str]]:
    """Return the steps of the colour scale that layers use, each with its title."""
    used = {bisect_right(BIT_STEPS, row.bits_per_weight) for row in rows if row.layer is not None}
    return [(step, STEP_TITLES[step]) for step in sorted(used)]


def _svg(kind: str, width: int, label: str, cells: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="{}" viewBox="0 0 {} 1" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(kind, width, label, Markup("").join(cells))
