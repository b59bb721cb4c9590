"""Messages to and from a child process: a JSON header, then the bytes of its arrays.

Both ends know the type of every value from annotations and accept nothing else. The JSON supports any text, including
lone surrogates, and any float. Unlike with pickles, received data is never executed.
"""

import json
import math
import os
import select
import struct
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:  # most messages contain no arrays
    import numpy as np
    from numpy.typing import NDArray

Json = Any
# Bytes of the header, and of the arrays.
LENGTHS = struct.Struct("<IQ")
DTYPES = frozenset(("|i1", "|u1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<i8", "<u8", "<f8"))
MOST_DIMENSIONS = 8
ALIGNMENT = 8
# Length limit of an error message.
MESSAGE_CHARACTERS = 4000
# The system can wait at most a few weeks at a time.
WAIT_S = 3600.0
# Bytes per read or write; larger steps are not faster.
STEP = 1 << 20


class WrongKindError(Exception):
    """A value or a message is not of the expected kind."""


class Room(NamedTuple):
    """The maximum size of a message.

    Attributes:
        header: Bytes of JSON; the parsed Python objects may take 48 times as much.
        arrays: Bytes of all arrays together.
    """

    header: int
    arrays: int


class Arrays:
    """The concatenated arrays of a message, each aligned to 8 bytes."""

    def __init__(self, data: "NDArray[np.uint8] | None" = None) -> None:
        self.parts: list[NDArray[np.uint8]] = []
        self._data, self._at = data, 0

    def put(self, array: "NDArray[Any]") -> Json:
        """Append an array, and return its description for the header."""
        import numpy as np

        dtype = array.dtype.newbyteorder("<").str
        if dtype not in DTYPES:
            raise WrongKindError(f"no array of dtype {array.dtype} can be sent")
        part = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
        self.parts += [part, np.zeros(-part.size % ALIGNMENT, np.uint8)]
        return {"dtype": dtype, "shape": list(array.shape)}

    def take(self, header: Json) -> "NDArray[Any]":
        """Return the next array as a view, given its description in the header."""
        import numpy as np

        dtype, shape = (header.get("dtype"), header.get("shape")) if isinstance(header, dict) else (None, None)
        lengths: list[Any] = shape if isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS else [None]
        if not isinstance(dtype, str) or dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in lengths):
            raise WrongKindError("an array of numbers was expected")
        size = math.prod(lengths) * np.dtype(dtype).itemsize
        data = np.empty(0, np.uint8) if self._data is None else self._data
        if self._at + size > data.size:
            raise WrongKindError(f"an array of {size:,} bytes was announced, of which {data.size - self._at:,} came")
        part = data[self._at : self._at + size]
        self._at += size + -size % ALIGNMENT
        try:
            return part.view(dtype).reshape(lengths)
        except (ValueError, OverflowError):
            raise WrongKindError("an array has an impossible shape") from None


class Kind(NamedTuple):
    """Conversion of values of one annotation to JSON and back; both directions raise `WrongKindError`."""

    pack: Callable[[Any, Arrays], Json]
    unpack: Callable[[Json, Arrays], Any]


@cache
def kind_of(annotation: Any) -> Kind:
    """Return the conversion for values of an annotation.

    Raises:
        TypeError: they cannot be sent.
    """
    if annotation in PLAIN:
        return PLAIN[annotation]
    if isinstance(annotation, type) and hasattr(annotation, "__dataclass_fields__"):
        return _dataclass(annotation)
    origin = get_origin(annotation)
    composed = _array if getattr(origin, "__name__", None) == "ndarray" else COMPOSED.get(origin)
    if composed is None:
        raise TypeError(f"values of {annotation} cannot be sent to or from a child process")
    return composed(get_args(annotation))


def _instance(value: Any, expected: type) -> Any:
    # In Python, a bool is an int.
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise WrongKindError(f"a {expected.__name__} was expected, not a {type(value).__name__}")
    return value


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if not any(type(value) is type(one) and value == one for one in known):
        raise WrongKindError(f"one of {known} was expected")
    return value


def _float(value: Any) -> float:
    try:
        return float(value if isinstance(value, float) else _instance(value, int))
    except OverflowError:
        raise WrongKindError("a float was expected, not so large an int") from None


def _checked(check: Callable[[Any], Any]) -> Kind:
    """Return the kind of values that JSON supports natively."""
    return Kind(lambda value, _: check(value), lambda data, _: check(data))


def _json(value: Any, arrays: Arrays) -> Json:
    """Return a value unchanged if JSON preserves it."""
    if isinstance(value, list):
        return [_json(one, arrays) for one in value]
    if isinstance(value, dict):
        return {_instance(name, str): _json(one, arrays) for name, one in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise WrongKindError(f"a value of JSON was expected, not a {type(value).__name__}")


def _several(values: Any) -> Any:
    # In Python, a string is a sequence of strings.
    if isinstance(values, str) or not isinstance(values, Collection):
        raise WrongKindError(f"several values were expected, not a {type(values).__name__}")
    return values


def _literal(known: tuple[Any, ...]) -> Kind:
    return _checked(lambda value: _one_of(value, known))


def _union(inner: tuple[Any, ...]) -> Kind:
    kinds = [kind_of(one) for one in inner]

    def first(functions: list[Callable[[Any, Arrays], Any]], value: Any, arrays: Arrays) -> Any:
        for function in functions[:-1]:
            with suppress(WrongKindError):
                return function(value, arrays)
        return functions[-1](value, arrays)

    packs, unpacks = [kind.pack for kind in kinds], [kind.unpack for kind in kinds]
    return Kind(lambda value, arrays: first(packs, value, arrays), lambda data, arrays: first(unpacks, data, arrays))


def _list(inner: tuple[Any, ...]) -> Kind:
    kind = kind_of(inner[0])
    return Kind(
        lambda values, arrays: [kind.pack(value, arrays) for value in _several(values)],
        lambda data, arrays: [kind.unpack(one, arrays) for one in _instance(data, list)],
    )


def _tuple(inner: tuple[Any, ...]) -> Kind:
    if inner[-1] is Ellipsis:
        several = _list(inner)
        return Kind(several.pack, lambda data, arrays: tuple(several.unpack(data, arrays)))
    kinds = [kind_of(one) for one in inner]

    def paired(values: Any) -> Iterator[tuple[Kind, Any]]:
        if len(values) != len(kinds):
            raise WrongKindError(f"{len(kinds)} values were expected, not {len(values)}")
        return zip(kinds, values, strict=True)

    return Kind(
        lambda values, arrays: [kind.pack(value, arrays) for kind, value in paired(_instance(values, tuple))],
        lambda data, arrays: tuple(kind.unpack(one, arrays) for kind, one in paired(_instance(data, list))),
    )


def _mapping(inner: tuple[Any, ...]) -> Kind:
    name, kind = map(kind_of, inner)
    return Kind(
        lambda values, arrays: {name.pack(key, arrays): kind.pack(one, arrays) for key, one in values.items()},
        lambda data, arrays: {
            name.unpack(key, arrays): kind.unpack(one, arrays) for key, one in _instance(data, dict).items()
        },
    )


def _dataclass(made: type) -> Kind:
    from dataclasses import fields  # here, since a child process without dataclasses starts faster

    hints = get_type_hints(made)
    kinds = {field.name: kind_of(hints[field.name]) for field in fields(made)}

    def pack(value: Any, arrays: Arrays) -> Json:
        _instance(value, made)
        return {name: kind.pack(getattr(value, name), arrays) for name, kind in kinds.items()}

    def unpack(data: Json, arrays: Arrays) -> Any:
        if _instance(data, dict).keys() != kinds.keys():
            raise WrongKindError(f"the fields of {made.__name__} were expected")
        return made(**{name: kind.unpack(data[name], arrays) for name, kind in kinds.items()})

    return Kind(pack, unpack)


def _array(inner: tuple[Any, ...]) -> Kind:
    import numpy as np

    # NDArray[np.float32] is ndarray[Any, dtype[float32]].
    scalar = get_args(inner[1])[0]

    def of_dtype(array: "NDArray[Any]") -> "NDArray[Any]":
        if scalar is not Any and array.dtype != np.dtype(scalar):
            raise WrongKindError(f"an array of {np.dtype(scalar)} was expected, not of {array.dtype}")
        return array

    return Kind(
        lambda value, arrays: arrays.put(of_dtype(_instance(value, np.ndarray))),
        lambda data, arrays: of_dtype(arrays.take(data)),
    )


PLAIN: dict[Any, Kind] = {
    Any: Kind(_json, lambda data, _: data),
    None: _checked(lambda value: _instance(value, types.NoneType)),
    float: _checked(_float),
    Path: Kind(lambda value, _: str(_instance(value, Path)), lambda data, _: Path(_instance(data, str))),
    **{kind: _checked(partial(_instance, expected=kind)) for kind in (types.NoneType, bool, int, str)},
}
COMPOSED: dict[Any, Callable[[tuple[Any, ...]], Kind]] = {
    Literal: _literal,
    **dict.fromkeys((Union, types.UnionType), _union),
    **dict.fromkeys((list, Sequence, Collection, Iterable), _list),
    **dict.fromkeys((dict, Mapping), _mapping),
    tuple: _tuple,
}


def send(descriptor: int, header: Json, arrays: Arrays, end: float = math.inf) -> None:
    """Send a message.

    Args:
        descriptor: One end of a pipe; it may be blocking if there is no deadline.
        header: JSON.
        arrays: The arrays in it.
        end: Deadline on the monotonic clock.

    Raises:
        TimeoutError: the other end did not read it before the deadline.
        OSError: the other end is closed.
    """
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    lengths = LENGTHS.pack(len(text), sum(part.size for part in arrays.parts))
    for part in (memoryview(lengths + text), *(part.data for part in arrays.parts)):
        _write(descriptor, part, end)


def receive(descriptor: int, room: Room, end: float = math.inf) -> tuple[Json, Arrays]:
    """Receive a message.

    Args:
        descriptor: One end of a pipe; it may be blocking if there is no deadline.
        room: The maximum size.
        end: Deadline on the monotonic clock.

    Raises:
        TimeoutError: the message did not arrive before the deadline.
        EOFError: the other end was closed.
        WrongKindError: it is not a message, or is too large.
    """
    lengths = bytearray(LENGTHS.size)
    _read(descriptor, memoryview(lengths), end)
    header_size, arrays_size = LENGTHS.unpack(lengths)
    if header_size > room.header or arrays_size > room.arrays:
        raise WrongKindError(
            f"a message of {header_size:,} + {arrays_size:,} bytes was announced, at most {room.header:,} + "
            f"{room.arrays:,} were expected"
        )
    text, data = bytearray(header_size), None
    _read(descriptor, memoryview(text), end)
    if arrays_size:
        import numpy as np

        # Pages that are never written take no memory.
        data = np.empty(arrays_size, np.uint8)
        _read(descriptor, data.data, end)
    try:
        return json.loads(text.decode("utf-8", "surrogatepass")), Arrays(data)
    except (ValueError, RecursionError) as error:
        raise WrongKindError(f"a message was expected: {type(error).__name__}") from None


def _write(descriptor: int, left: memoryview, end: float) -> None:
    while left:
        try:
            left = left[os.write(descriptor, left[:STEP]) :]
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT, end)


def _read(descriptor: int, left: memoryview, end: float) -> None:
    while left:
        try:
            count = os.readv(descriptor, [left[:STEP]])
        except BlockingIOError:
            _wait(descriptor, select.POLLIN, end)
            continue
        if not count:
            raise EOFError
        left = left[count:]


def _wait(descriptor: int, event: int, end: float) -> None:
    """Wait until a pipe is readable or writable; a pipe that is ready after the deadline still counts."""
    waiting = select.poll()
    waiting.register(descriptor, event)
    while not waiting.poll(1000 * min(max(0.0, end - time.monotonic()), WAIT_S)):
        if time.monotonic() >= end:
            raise TimeoutError
