"""Small inputs that claim much: each must be refused in one sentence, at once and in little memory."""

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from exporter.coding.container import MAGIC, check_file
from exporter.coding.in_memory import ResidentFile
from exporter.coding.layout import CODES, NUMBERS, FileSection, array_part
from exporter.device.profile import load_device
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.model.chat import render
from exporter.model.checkpoint import open_checkpoint
from exporter.model.gguf_file import open_whole
from exporter.model.json_file import read_json_object
from exporter.model.template import open_renderer
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.recipe import load_recipe
from exporter.targets.onnx.graph_partition import cut
from tests.models import VOCAB, tiny_model

Attempt = Callable[[Random], bool]
Prepare = Callable[[Path], Attempt]


# Coded files


def _coded(*chunks: tuple[int, bytes], size: int | None = None) -> bytes:
    whole = sum(count for count, _ in chunks) if size is None else size
    header = struct.pack("<8sHQ32sH", MAGIC, 1, whole, bytes(32), 1) + b"x"
    made = [header, struct.pack("<I", zlib.crc32(header))]
    for count, payload in chunks:
        sizes = struct.pack("<II", count, len(payload))
        made += [sizes, struct.pack("<I", zlib.crc32(payload, zlib.crc32(sizes))), payload]
    return b"".join(made)


def _numbers(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def _tables(parts: int) -> tuple[int, bytes]:
    """Return a chunk of small matrices of codes, each with 31 tables of one symbol."""
    classes = np.arange(16, dtype=np.uint8)
    pairs = (classes[::2] | classes[1::2] << 4).tobytes()
    lanes = max(1, min(2048, parts * 256 // 2048))
    head = _numbers(16, 16, 1) + bytes((CODES, 1, 0))
    states = _numbers(lanes, 0, *[1 << 16] * lanes)
    shapes, tables = bytes((6,)) + 2 * pairs, bytes(2 * 31)
    described = struct.pack("<H", parts) + parts * head + parts * shapes + parts * b"\1"
    return parts * 256, described + parts * tables + states


def _wide() -> tuple[int, bytes]:
    """Return a chunk of numbers of so many bytes that each of them makes thousands of streams."""
    head = (_numbers(1, 1, 1) + struct.pack("<BH", NUMBERS, 65535)) * 120
    return 120 * 65535, struct.pack("<H", 120) + head + bytes((1,)) * 120 + bytes(2 * 120 * 65535)


def _one_symbol(count: int) -> tuple[int, bytes]:
    head = struct.pack("<H", 1) + _numbers(count, 1, 1) + bytes((CODES, 1, 0))
    return count, head + b"\0\1\0\0" + _numbers(1, 0, 1 << 16)


def _hold_large_array(path: Path) -> None:
    ResidentFile(path, [FileSection(0, array_part((1 << 50, 1), np.dtype(np.uint8)))])


# GGUF


def _gguf(*keys: bytes, tensors: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    count = (tensors.count(b"weight"), len(keys)) if counts is None else counts
    return b"GGUF" + struct.pack("<IQQ", 3, *count) + b"".join(keys) + tensors + bytes(4096)


def _key(kind: int, count: int, values: bytes, name: bytes = b"x") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, kind, count) + values


def _tensor(*shape: int, offset: int = 0, name: bytes = b"weight") -> bytes:
    place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
    return struct.pack("<Q", len(name)) + name + place


# ONNX


def _graph(nodes: int, parts: int = 1) -> bytes:
    """Return a graph whose layers take the last of a chain of constants, each of which takes the one before twice."""
    model = ModelProto()
    model.graph.initializer.add(name="c0", data_type=TensorProto.FLOAT, dims=[1], float_data=[0.0])
    for i in range(nodes):
        model.graph.node.append(helper.make_node("Add", [f"c{i}", f"c{i}"], [f"c{i + 1}"]))
    for part in range(parts):
        name = f"/model/layers.{part}/x"
        model.graph.node.append(helper.make_node("Add", [f"c{nodes}", "input"], [f"o{part}"], name=name))
    return bytes(model.SerializeToString())


def _length(number: int) -> bytes:
    return bytes((number & 127,)) if number < 128 else bytes((number & 127 | 128,)) + _length(number >> 7)


def _empty_messages(*path: int) -> bytes:
    """Return a graph with millions of empty messages at a place."""
    made = bytes((path[-1] << 3 | 2, 0)) * (1 << 21)
    for number in path[-2::-1]:
        made = bytes((number << 3 | 2,)) + _length(len(made)) + made
    return made


def _cut(path: Path) -> None:
    cut(path.read_bytes(), path)


# What makes files


def _file(make: Callable[[], bytes], use: Callable[[Path], object], name: str = "bomb") -> Prepare:
    def prepare(folder: Path) -> Attempt:
        (folder / name).write_bytes(make())

        def attempt(_: Random) -> bool:
            use(folder / name)
            return True

        return attempt

    return prepare


def _toml(make: Callable[[], bytes]) -> Prepare:
    def use(path: Path) -> None:
        for read in (load_recipe, load_device):
            with pytest.raises(InputError) as refused:
                read(str(path))
        raise refused.value

    return _file(make, use, "bomb.toml")


def _safetensors(header: Callable[[], bytes], claimed: int | None = None) -> Prepare:
    def make() -> bytes:
        data = header()
        return struct.pack("<Q", len(data) if claimed is None else claimed) + data + bytes(4)

    return _file(make, lambda path: open_checkpoint(path.parent), "model.safetensors")


def _template(text: str) -> Prepare:
    """Return an attempt to render a template in a process that is there already."""

    def prepare(folder: Path) -> Attempt:
        tokenizer = load_tokenizer(tiny_model(folder / "model", layers=1))
        child = open_renderer(replace(tokenizer, templates={"default": text}))

        def attempt(_: Random) -> bool:
            with child:
                try:
                    rendered = render(child, [{"role": "user", "content": "a"}], prompt=False)
                except RuntimeCrashError:
                    return False
            return rendered.text is not None

        return attempt

    return prepare


def _absurd_ids(folder: Path) -> Attempt:
    """Return an attempt to load a tokenizer whose ids are as large as numbers of 32 bits."""
    model = tiny_model(folder / "model", layers=1)
    load_tokenizer(model)
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["absurd"] = (1 << 32) - 1
    content["added_tokens"].append(content["added_tokens"][0] | {"id": (1 << 31) - 1, "content": "<absurd>"})
    path.write_text(json.dumps(content))
    return lambda _: bool(load_tokenizer(model, VOCAB))


TOML_BYTES = 1 << 18
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BOMBS: dict[str, Prepare] = {
    "coded-tables": _file(lambda: _coded(_tables(4000)), check_file),
    "coded-parts": _file(lambda: _coded(_tables(30000)), check_file),
    "coded-streams": _file(lambda: _coded(_wide()), check_file),
    "coded-small-chunks": _file(lambda: _coded(*[_one_symbol(2000)] * 20000), check_file),
    "coded-claimed-array": _file(lambda: _coded(_one_symbol(2000)), _hold_large_array),
    "gguf-bytes": _file(lambda: _gguf(_key(0, (1 << 22) + 1, bytes((1 << 22) + 1))), open_whole),
    "gguf-texts": _file(lambda: _gguf(_key(8, 1 << 22, bytes(8 << 22))), open_whole),
    "gguf-arrays": _file(lambda: _gguf(*(_key(0, 4096, bytes(4096), b"%d" % i) for i in range(4000))), open_whole),
    "gguf-nested": _file(lambda: _gguf(_key(9, 1, struct.pack("<IQ", 9, 1) * 100_000)), open_whole),
    "gguf-claimed-array": _file(lambda: _gguf(_key(10, 1 << 61, b"")), open_whole),
    "gguf-keys": _file(lambda: _gguf(*(_key(0, 0, b"", b"%d" % i) for i in range(500_000))), open_whole),
    "gguf-claimed-keys": _file(lambda: _gguf(counts=(0, 1 << 63)), open_whole),
    "gguf-claimed-tensors": _file(lambda: _gguf(counts=(1 << 63, 0)), open_whole),
    "gguf-tensors": _file(lambda: _gguf(tensors=_tensor(1) * 500_000), open_whole),
    "gguf-overflow": _file(lambda: _gguf(tensors=_tensor(1 << 32, 1 << 32)), open_whole),
    "gguf-outside": _file(lambda: _gguf(tensors=_tensor(32, offset=1 << 40)), open_whole),
    "gguf-overlap": _file(lambda: _gguf(tensors=_tensor(32) + _tensor(32, offset=32, name=b"weights")), open_whole),
    "gguf-dimensions": _file(lambda: _gguf(tensors=_tensor(*[1] * 100_000)), open_whole),
    "onnx-chained": _file(lambda: _graph(64), _cut),
    "onnx-long-chain": _file(lambda: _graph(50_000), _cut),
    "onnx-chain-of-parts": _file(lambda: _graph(20_000, 9_000), _cut),
    "onnx-names": _file(lambda: _graph(1).replace(b"layers.0/x", b"layers.\xff/x"), _cut),
    "onnx-nodes": _file(lambda: _empty_messages(7, 1), _cut),
    "onnx-initialisers": _file(lambda: _empty_messages(7, 5), _cut),
    "onnx-attributes": _file(lambda: _empty_messages(7, 1, 5), _cut),
    "onnx-large": _file(lambda: _empty_messages(7, 13) * 2, _cut),
    "json-deep": _file(lambda: b'{"a":' * (1 << 20), read_json_object),
    "json-lists": _file(lambda: b'{"a": [' + b"[]," * (10 << 20) + b"0]}", read_json_object),
    "json-wide": _file(lambda: b'{"a": "\xf0\x9f\x98\x80' + b"a" * (100 << 20) + b'"}', read_json_object),
    "json-digits": _file(lambda: b'{"a": ' + b"9" * (10 << 20) + b"}", read_json_object),
    "toml-dots": _toml(lambda: b"a" + b".a" * (TOML_BYTES // 2 - 20) + b" = 1"),
    "toml-lines-of-dots": _toml(lambda: b"\n".join(b"a%d" % i + b".a" * 250 + b" = 1" for i in range(300))),
    "toml-lists": _toml(lambda: b"a = " + b"[" * (TOML_BYTES // 2 - 20) + b"]" * (TOML_BYTES // 2 - 20)),
    "toml-tables": _toml(lambda: b"a = " + b"{a=" * (TOML_BYTES // 4 - 20) + b"1" + b"}" * (TOML_BYTES // 4 - 20)),
    "toml-digits": _toml(lambda: b"schema_version = 0x" + b"f" * (TOML_BYTES - 40)),
    "toml-name": _toml(lambda: b'"' + b"a" * (TOML_BYTES - 40) + b'" = 1'),
    "toml-large": _toml(lambda: b"#" * (200 << 20)),
    "safetensors-tensors": _safetensors(lambda: json.dumps({str(i): TENSOR for i in range(300_000)}).encode()),
    "safetensors-claimed": _safetensors(lambda: b"{}", 1 << 63),
    "safetensors-deep": _safetensors(lambda: b'{"a":' * 1_000_000),
    "template-text": _template("{{ 'a' * 4000000000 }}"),
    "template-loop": _template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "template-doubled": _template(
        "{% set x = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set x.t = x.t + x.t %}{% endfor %}"
    ),
    "tokenizer-ids": _absurd_ids,
}
