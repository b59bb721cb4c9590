"""Changes to inputs, each drawn from a random generator alone: bytes, JSON, TOML, GGUF, safetensors and coded files."""

import copy
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

INTEGERS = (
    0, 1, 2, 3, 4, 9, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
DEEP = 3000
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.0, -0.5, 0.1, 1e-320, 1e300, float("inf"), float("nan"), 1 << 31, 1 << 63,
    1 << 70, -(1 << 63), 10**40, "", "x", "0", "\x00", "\x1b[31m", "a" * 300, "{" * 200, "é\u2581", "😀", "../x", "[x]",
    "a\nb", [], {}, [[]], [None], [0], [1, "a"], ["a", "b"], {"a": {}}, ["x"] * 2000, [0.5] * 300,
    {"content": 5}, {"type": "x"}, {"value": 1, "unit": "x", "basis": "measured"},
)  # fmt: skip


def mutated_bytes(data: bytes, chance: Random) -> bytes:
    """Return bytes with one to four changes anywhere."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice(BYTE_CHANGES)(made, chance)
    return bytes(made)


def _place(data: bytearray, chance: Random) -> int:
    # Headers decide more than what follows them.
    return chance.randrange(min(len(data), chance.choice((64, 1024, len(data) + 1))) + 1)


def _flip(data: bytearray, chance: Random) -> None:
    if data:
        data[min(_place(data, chance), len(data) - 1)] ^= 1 << chance.randrange(8)


def _overwrite(data: bytearray, chance: Random) -> None:
    at = _place(data, chance)
    data[at : at + 1] = bytes((chance.randrange(256),))


def _truncate(data: bytearray, chance: Random) -> None:
    del data[_place(data, chance) :]


def _insert(data: bytearray, chance: Random) -> None:
    at = _place(data, chance)
    data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 40)))


def _remove(data: bytearray, chance: Random) -> None:
    at = _place(data, chance)
    del data[at : at + chance.choice((1, 2, 4, 8, 40))]


def _duplicate(data: bytearray, chance: Random) -> None:
    at, size = _place(data, chance), chance.choice((1, 8, 64, 512))
    data[at:at] = data[at : at + size]


def _splice(data: bytearray, chance: Random) -> None:
    at, width = _place(data, chance), chance.choice((1, 2, 4, 8))
    data[at : at + width] = number(chance, width)


BYTE_CHANGES: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip, _flip, _overwrite, _truncate, _insert, _remove, _duplicate, _splice, _splice,
)  # fmt: skip


def number(chance: Random, width: int) -> bytes:
    """Return an interesting whole number as little-endian bytes."""
    value = chance.choice(INTEGERS) + chance.choice((0, 0, 0, 1, -1))
    return (value % (1 << 8 * width)).to_bytes(width, "little")


# JSON


def mutated_json(content: Any, chance: Random) -> bytes:
    """Return the text of a JSON value with one to three changes: in most of them it is still JSON."""
    if chance.random() < 0.1:
        return mutated_bytes(json.dumps(content).encode(), chance)
    made = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        made = changed_value(made, chance)
    text = json.dumps(made)
    if chance.random() < 0.06 and text[:2] == '{"':
        deep = chance.choice(('{"a":', "["))
        twice = chance.choice((text[1 : text.index(":")], '"more"'))
        nested = deep * DEEP + "1" + {"[": "]", '{"a":': "}"}[deep] * DEEP
        text = "{" + f"{twice}: {chance.choice((nested, '9' * 5000, '1e999', 'NaN', 'null'))}, " + text[1:]
    return text.encode()


def changed_value(value: Any, chance: Random) -> Any:
    """Change a value in place at one place inside it; return it, or what takes the place of all of it."""
    places = list(_places(value))
    if not places or chance.random() < 0.02:
        return chance.choice(STRANGE)
    # As many changes near the root as in its longest list.
    depth = chance.randrange(max(len(place) for place in places)) + 1
    *above, last = chance.choice([place for place in places if len(place) <= depth])
    parent = value
    for step in above:
        parent = parent[step]
    kind = chance.random()
    if kind < 0.2:
        del parent[last]
    elif kind < 0.3:
        *_, other = chance.choice(places)
        parent[last] = other
    elif kind < 0.4 and isinstance(parent[last], int | float):
        parent[last] = chance.choice((-1, 2, 1 << 16, 0.5)) * parent[last]
    elif kind < 0.45 and isinstance(parent, dict):
        parent[chance.choice(("", "x", "__class__", "a" * 400, "\x1b[2J"))] = parent.pop(last)
    elif kind < 0.5 and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    else:
        parent[last] = copy.deepcopy(chance.choice(STRANGE))
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield paths to the values inside a value; of a long list only to the first ones."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys[:40]:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


# TOML

TOML_VALUES = (
    "true", "-1", "0", "1", "3.5", "inf", "-inf", "nan", "1e308", "9223372036854775808", "9" * 4000, "0x" + "f" * 6000,
    '""', '"x"', '"\\u001b[31m"', '"../../x"', '"' + "a" * 2000 + '"', "[]", "{}", "[[]]", "{ a = 1 }", "[1, 'a']",
    "1979-05-27T07:32:00Z", "07:32:00", "[" * 2000 + "]" * 2000, "{ a = " * 300 + "1" + " }" * 300, '"""', "'",
    '{ value = 1, basis = "published", source = "x" }', '{ value = nan, basis = "measured", source = "\\t" }',
)  # fmt: skip


def mutated_toml(data: bytes, chance: Random) -> bytes:
    """Return a TOML text with one to three changed lines, or changed bytes."""
    if chance.random() < 0.1:
        return mutated_bytes(data, chance)
    lines = data.decode().split("\n")
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        key = lines[at].partition("=")[0].strip() or "x"
        kind = chance.random()
        if kind < 0.55:
            lines[at] = f"{key} = {chance.choice(TOML_VALUES)}"
        elif kind < 0.7:
            del lines[at]
        elif kind < 0.8:
            lines.insert(chance.randrange(len(lines) + 1), lines[at])
        elif kind < 0.85:
            lines[at] = ".".join(key for _ in range(chance.choice((2, 100, 3000)))) + " = 1"
        elif kind < 0.9:
            lines.insert(at, chance.choice(("[x]", "[[x]]", f"[{key}]", "[step]", "[a.b.c]", "\x00", "\ufeff")))
        else:
            lines[at] = lines[at].replace("=", chance.choice(("", "==", ".x =")), 1)
        lines = lines or [""]
    return "\n".join(lines).encode()


# GGUF

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Return place and width of every number in the header of a whole GGUF file: counts, lengths, types, offsets."""
    found: list[tuple[int, int]] = []
    at = 4

    def take(width: int) -> int:
        nonlocal at
        found.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def text() -> None:
        nonlocal at
        length = take(8)
        at += length

    def value(kind: int) -> None:
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            inner, length = take(4), take(8)
            for number in range(length):
                kept = len(found)
                value(inner)
                if number > 3:
                    del found[kept:]
        else:
            take(_SCALARS[kind])

    take(4)
    tensors, keys = take(8), take(8)
    for _ in range(keys):
        text()
        value(take(4))
    for _ in range(tensors):
        text()
        for _ in range(take(4)):
            take(8)
        take(4)
        take(8)
    return found


def mutated_gguf(data: bytes, numbers: list[tuple[int, int]], chance: Random) -> bytes:
    """Return a GGUF file with changed numbers in its header, or changed bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at, width = chance.choice(numbers)
        if chance.random() < 0.5:
            made[at : at + width] = number(chance, width)
        else:
            value = int.from_bytes(made[at : at + width], "little") + chance.choice((-1, 1, -32, 32, 256))
            made[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(made)


# safetensors


def mutated_safetensors(data: bytes, chance: Random) -> bytes:
    """Return a safetensors file with another header, whose length is right in most of them, or changed bytes."""
    if chance.random() < 0.25:
        return mutated_bytes(data, chance)
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.5:
        name = chance.choice([name for name in header if name != "__metadata__"])
        one = header[name]
        kind = chance.random()
        if kind < 0.3:
            at = chance.randrange(2)
            one["data_offsets"][at] = chance.choice((*INTEGERS, one["data_offsets"][at] + chance.choice((-4, 4, 1))))
        elif kind < 0.6:
            turned, longer = one["shape"][::-1], [1, *one["shape"]]
            one["shape"] = chance.choice(([], [0], [1 << 62, 4], [-1], turned, longer, [1] * 900))
        elif kind < 0.8:
            one["dtype"] = chance.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "F4", "x", ""))
        else:
            header[chance.choice(("x", "", "\x00", "lm_head.weight", "a" * 5000))] = header.pop(name)
        made = json.dumps(header).encode()
    else:
        made = mutated_json(header, chance)
    size = struct.pack("<Q", len(made)) if chance.random() < 0.9 else number(chance, 8)
    return size + made + data[8 + length :]


# Coded files: a header with its checksum, then chunks, each with its own.

_FIXED = struct.Struct("<8sHQ32sH")


def mutated_coded(data: bytes, chance: Random) -> bytes:
    """Return a coded file with a changed header or chunk whose checksum is right again, or changed bytes."""
    if chance.random() < 0.15:
        return mutated_bytes(data, chance)
    header, chunks = _taken_apart(data)
    kind = chance.random()
    if kind < 0.15:
        header = mutated_bytes(header, chance)
    elif kind < 0.25:
        at = chance.randrange(len(chunks))
        chunks[at : at + 1] = chance.choice(([], [chunks[at]] * 2, chunks[::-1]))
    elif kind < 0.35:
        at = chance.randrange(len(chunks))
        chunks[at] = (chance.choice((*INTEGERS[:18], chunks[at][0] + 1)) % (1 << 32), chunks[at][1])
    else:
        at = chance.randrange(len(chunks))
        chunks[at] = (chunks[at][0], mutated_bytes(chunks[at][1], chance))
    made = [header, struct.pack("<I", zlib.crc32(header))]
    for size, payload in chunks:
        sizes = struct.pack("<II", size, len(payload))
        made += [sizes, struct.pack("<I", zlib.crc32(payload, zlib.crc32(sizes))), payload]
    return b"".join(made)


def _taken_apart(data: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    *_, length = _FIXED.unpack_from(data)
    at = _FIXED.size + length
    header, chunks = data[:at], []
    at += 4
    while at < len(data):
        size, payload, _ = struct.unpack_from("<III", data, at)
        chunks.append((size, data[at + 12 : at + 12 + payload]))
        at += 12 + payload
    return header, chunks
