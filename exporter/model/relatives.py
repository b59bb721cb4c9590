"""Finds the supported family that a model of an unknown one resembles most, and says in what they differ."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.foundation.config_files import shown
from exporter.model.config_keys import foreign_keys
from exporter.model.decoder import Decoder
from exporter.model.family import Family, attention_only, families, no_experts, no_layer_inputs
from exporter.model.shape import Experts

# A tensor of a block: its name within the block follows the block's number.
IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.\d+\.(.+)")
NUMBER = re.compile(r"\.\d+\.")
# A model has a few dozen keys, and names of a few dozen tensors in a block.
MOST_KEYS, MOST_NAMES, SHOWN = 500, 2000, 4
LAYERS = 4


@dataclass(frozen=True)
class Difference:
    """In what a model differs from those of a family.

    Attributes:
        family: The family.
        alike: Share of the tensors of both blocks that both have.
        more: Tensors of the model's blocks that the family's blocks do not have.
        fewer: The reverse.
        foreign: Keys of config.json that the family does not know, and whose values may change something.
        absent: Number of keys of the family's own that config.json leaves out.
    """

    family: Family
    alike: float
    more: tuple[str, ...]
    fewer: tuple[str, ...]
    foreign: tuple[str, ...]
    absent: int

    @property
    def told(self) -> str:
        """The nearest family and the differences, as the end of an error."""
        family = self.family
        named = f"{family.model_type} ({family.title})"
        parts = {
            "its blocks lack": self.fewer,
            "its blocks have besides": self.more,
            "config.json sets besides": self.foreign,
        }
        said = "; ".join(f"{what} {_listed(names)}" for what, names in parts.items() if names)
        if said:
            return f"the nearest family is {named}: {said}"
        alike = "keys and tensors" if self.alike else "keys"
        return (
            f"{alike} are those of {named}: if it computes the same, give config.json the model_type "
            f"{family.model_type!r} and the architecture {family.architecture!r}"
        )


def nearest(raw: Mapping[str, Any], tensors: Iterable[str]) -> Difference:
    """Return the family whose blocks and keys are most like a model's, and the differences.

    Of several with the same tensors, the one counts that knows the most keys, then the one of whose own keys the fewest
    are left out, then the one that the model's own name holds, then the first by name.

    Args:
        raw: The content of config.json.
        tensors: Names of the model's tensors; empty if they are not known.
    """
    held = _in_blocks(tensors)
    own_name = f"{raw.get('architectures')} {raw.get('model_type')}".lower()
    keys = {key: raw[key] for key in sorted(raw)[:MOST_KEYS] if key not in ("architectures", "model_type", "auto_map")}

    def order(found: Difference) -> tuple[float, int, int, bool, str]:
        name = found.family.model_type
        return -found.alike, len(found.foreign), found.absent, name not in own_name, name

    return min((_difference(keys, held, family) for family in families().values()), key=order)


def _difference(raw: Mapping[str, Any], held: Collection[str], family: Family) -> Difference:
    needed = block_tensors(family) if held else frozenset()
    common, union = len(needed & set(held)), len(needed | set(held))
    return Difference(
        family,
        common / max(union, 1),
        tuple(sorted(set(held) - needed)),
        tuple(sorted(needed - set(held))),
        tuple(foreign_keys(raw, family)),
        len(family.honoured.keys() - raw.keys()),
    )


def block_tensors(family: Family) -> frozenset[str]:
    """Return the names within their block of the tensors of a family's checkpoints; numbers of experts are left out."""
    kernels = (None,) * LAYERS if family.convolutions is attention_only else (3, None) * (LAYERS // 2)
    decoder = Decoder(
        family=family,
        layers=LAYERS,
        hidden=64,
        intermediate=(64,) * LAYERS,
        width_factors=(1,) * LAYERS,
        heads=4,
        kv_heads=2,
        head_dims=(16,) * LAYERS,
        key_layers=(None,) * LAYERS,
        rotary_width=16,
        vocab=64,
        tied=True,
        positions=64,
        windows=(None,) * LAYERS,
        convolutions=kernels,
        embedding_scale=1.0,
        residual_scale=1.0,
        logits_divisor=1.0,
        logits_cap=None,
        layer_input_width=0 if family.layer_input_width is no_layer_inputs else 16,
        activation="silu",
        experts=None if family.experts is no_experts else Experts(2, 1, 16),
    )
    return frozenset(_in_blocks(decoder.stored_tensors()))


def _in_blocks(tensors: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in tensors:
        match = IN_BLOCK.search(name)
        if match is not None and len(found) < MOST_NAMES:
            found.add(NUMBER.sub(".N.", match[1]))
    return found


def _listed(names: Collection[str]) -> str:
    some = ", ".join(shown(name) for name in list(names)[:SHOWN])
    return some + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
