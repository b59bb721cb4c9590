"""What goes through the pipe to a child process: every value comes back, and nothing else is taken for one."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as some_numpy
from numpy.typing import NDArray

from exporter.child.messages import DTYPES, LENGTHS, Arrays, Room, WrongKindError, kind_of, receive, send

ROOM = Room(1 << 20, 1 << 20)
Scalar = bool | int | float | str | None
Json = Any


@dataclass(frozen=True)
class Part:
    path: Path
    kind: Literal["gguf", "onnx"]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    parts: list[Part]
    named: Mapping[str, float]
    pair: tuple[str, bool] | None
    arrays: Sequence[NDArray[Any]]
    rest: Any


texts = some.text(some.characters(exclude_categories=()), max_size=8)
json_values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | texts,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arrays = some.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: some_numpy.arrays(dtype, some_numpy.array_shapes(min_dims=0, min_side=0, max_side=4))
)
paths = texts.filter(lambda text: "\0" not in text).map(Path)
parts = some.builds(Part, paths, some.sampled_from(["gguf", "onnx"]), some.lists(some.integers()).map(tuple))
wholes = some.builds(
    Whole,
    some.lists(parts, max_size=3),
    some.dictionaries(texts, some.floats(allow_nan=False), max_size=3),
    some.none() | some.tuples(texts, some.booleans()),
    some.lists(arrays, max_size=3),
    json_values,
)


def through(header: Json, sent: Arrays) -> tuple[Json, Arrays]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours.fileno(), header, sent)
        return receive(theirs.fileno(), ROOM)


@given(wholes)
def test_every_value_comes_back(value: Whole) -> None:
    kind, sent = kind_of(Whole), Arrays()
    got = kind.unpack(*through(kind.pack(value, sent), sent))
    assert (got.parts, got.named, got.pair, got.rest) == (value.parts, value.named, value.pair, value.rest)
    for one, other in zip(got.arrays, value.arrays, strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@given(json_values, some.binary(max_size=64))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_anything_else_is_refused(header: Json, data: bytes) -> None:
    for annotation in (Whole, Part, list[Part], tuple[int, str], NDArray[np.float32], dict[str, int], int | None):
        received = Arrays(np.frombuffer(data, np.uint8))
        try:
            value = kind_of(annotation).unpack(header, received)
        except WrongKindError:
            continue
        # What is taken is of that kind, for it can be sent.
        kind_of(annotation).pack(value, Arrays())


@given(some.text("<|fiuOVcb124869", max_size=4), some.lists(some.integers(-1, 1 << 80), max_size=9), some.binary())
def test_an_array_is_what_its_bytes_hold(dtype: str, shape: list[int], data: bytes) -> None:
    try:
        made = Arrays(np.frombuffer(data, np.uint8)).take({"dtype": dtype, "shape": shape})
    except WrongKindError:
        return
    assert dtype in DTYPES and list(made.shape) == shape and made.nbytes <= len(data)


@given(some.binary(max_size=200), some.booleans())
def test_any_bytes_are_a_message_or_refused(data: bytes, framed: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        os.write(ours.fileno(), LENGTHS.pack(len(data), 0) + data if framed else data)
        ours.close()
        try:
            receive(theirs.fileno(), ROOM)
        except (WrongKindError, EOFError):
            return
    assert framed


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True), (int, 1.0), (float, "1"), (str, Path("x")), (Path, "x"), (list[str], "text"), (list[int], [1.0]),
        (tuple[int, str], (1,)), (Literal["a"], "b"), (Any, (1,)), (Any, {1: 2}), (Part, {}), (float, 10**400),
        (NDArray[np.float32], np.zeros(2)), (NDArray[Any], np.array(["x"])), (NDArray[Any], np.array([object()])),
        (NDArray[np.float32], [1.0]), (int | None, "x"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_not_sent(annotation: Any, value: object) -> None:
    with pytest.raises(WrongKindError):
        kind_of(annotation).pack(value, Arrays())


@pytest.mark.parametrize("annotation", [set[int], bytes, complex, type])
def test_some_kinds_cannot_be_sent(annotation: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        kind_of(annotation)


def test_a_deadline_holds_for_reading_and_writing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        for work in (
            lambda: receive(ours.fileno(), ROOM, time.monotonic() + 0.05),
            lambda: send(ours.fileno(), "x" * (1 << 22), Arrays(), time.monotonic() + 0.05),
        ):
            with pytest.raises(TimeoutError):
                work()
