"""Partitions a decoder's graph at its layers, so that only the weights of one part at a time must be in memory.

The builder names nodes after their layer. The head is split further, into blocks of its rows. The embedding is looked
up in a table that holds only the requested rows.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from exporter.coding.in_memory import Span
from exporter.coding.layout import FileSection, array_part
from exporter.formats.format import Bytes
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError, RequestError
from exporter.model.limits import MAX_LAYERS, MAX_WIDTH
from exporter.targets.onnx.coded_layout import MOST_NODES, External, read_graph
from exporter.targets.onnx.session import PAST

LAYER = re.compile(r"/model/layers\.([0-9]{1,4})/")
EMBEDDING, HEAD = "/model/embed_tokens/", "/lm_head/"
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
PRODUCT = "MatMulNBits"
# Operators of an embedding whose table has one row per token; some families multiply what is looked up by a number.
LOOKUPS = {"Gather", "GatherBlockQuantized", "Reshape", "Constant", "Mul"}
# Rows of the head in one part: a multiple of the rows that kernels process at once, a few megabytes at usual widths.
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Weight:
    """An initialiser whose values are in the external data.

    Attributes:
        name: Its name; if it is stored in float16 and used in float32, the name of the widened value.
        shape: Its dimensions.
        span: Position of its bytes.
        stored: Type in the file.
        used: Type that the nodes use.
    """

    name: str
    shape: tuple[int, ...]
    span: Span
    stored: np.dtype[Any]
    used: np.dtype[Any]

    def rows(self, first: int, count: int) -> "Weight":
        """Return some of its rows.

        Raises:
            RequestError: it has no such rows.
        """
        if first < 0 or first + count > self.shape[0]:
            raise RequestError(f"{self.name} has no such rows", got=f"{count} from {first}", expected=self.shape[0])
        row = self.span.size // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), span=Span(self.span.start + first * row, count * row))

    def array(self, data: Bytes) -> NDArray[Any]:
        """Return its bytes as the type that the nodes use; widening keeps the values."""
        return data.view(self.stored).astype(self.used, copy=False).reshape(self.shape)

    @property
    def section(self) -> FileSection:
        """The section of the file that holds its bytes."""
        return FileSection(self.span.start, array_part(self.shape, self.stored))

    def reference(self) -> TensorProto:
        """Return an initialiser whose values are passed to a session separately from the graph."""
        kind = helper.np_dtype_to_tensor_dtype(self.used)
        tensor = TensorProto(name=self.name, data_type=kind, dims=self.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="given")
        return tensor


@dataclass(frozen=True)
class Segment:
    """A part of the graph that can be run by itself.

    Attributes:
        name: Such as `layers.3`.
        header: The model without its graph: the versions of its operators.
        nodes: Its nodes, in order.
        constants: Initialisers whose values are in the graph.
        weights: Initialisers whose values are in the external data.
        inputs: Values that it takes.
        outputs: Values that other parts or the caller use.
    """

    name: str
    header: ModelProto
    nodes: tuple[NodeProto, ...]
    constants: tuple[TensorProto, ...]
    weights: tuple[Weight, ...]
    inputs: tuple[ValueInfoProto, ...]
    outputs: tuple[ValueInfoProto, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights as the file stores them."""
        return sum(weight.span.size for weight in self.weights)

    @property
    def past(self) -> dict[str, tuple[int, ...]]:
        """Its inputs that hold what its layer keeps of earlier tokens -> their shapes; 0 for a size that varies."""
        return {
            given.name: tuple(dim.dim_value for dim in given.type.tensor_type.shape.dim)
            for given in self.inputs
            if given.name.startswith(PAST)
        }

    @cached_property
    def model(self) -> bytes:
        """The part as an ONNX model; its weights are passed to the session separately."""
        given = [weight.reference() for weight in self.weights]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, [*self.constants, *given])
        model = ModelProto()
        model.CopyFrom(self.header)
        model.graph.CopyFrom(graph)
        serialised: bytes = model.SerializeToString()
        return serialised

    def of_rows(self, first: int, count: int) -> "Segment":
        """Return the part of a single `MatMulNBits` that computes `count` of its outputs."""
        narrow = NodeProto()
        for node in self.nodes:
            if node.op_type == PRODUCT:
                narrow.CopyFrom(node)
        for attribute in narrow.attribute:
            if attribute.name == "N":
                attribute.i = count
        return replace(
            self,
            name=f"{self.name} from row {first}",
            nodes=tuple(narrow if node.op_type == PRODUCT else node for node in self.nodes),
            weights=tuple(weight.rows(first, count) for weight in self.weights),
        )

    def of_height(self, count: int) -> "Segment":
        """Return this lookup with a table of `count` rows."""
        return replace(self, weights=tuple(weight.rows(0, count) for weight in self.weights))


@dataclass(frozen=True)
class GraphCut:
    """All parts of a decoder, in the order in which they run.

    Attributes:
        masks: Computes the values that layers need from the attention mask; without weights.
        lookup: The embedding.
        layers: The layers, and the last normalisation.
        head: Matrix multiplications with a block of the head's rows each; their outputs are concatenated.
        tables: Values that several parts use and none changes: rotary tables.
    """

    masks: Segment
    lookup: Segment
    layers: tuple[Segment, ...]
    head: tuple[Segment, ...]
    tables: tuple[Weight, ...]

    @cached_property
    def parts(self) -> tuple[Segment, ...]:
        """All parts but the embedding."""
        return (self.masks, *self.layers, *self.head)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All weights: those of the parts, the tables, and the embedding's unless the head shares them."""
        own = [weight for part in self.parts for weight in part.weights]
        starts = {weight.span.start for weight in own}
        return (*own, *self.tables, *(one for one in self.lookup.weights if one.span.start not in starts))

    @cached_property
    def spent(self) -> dict[str, tuple[str, ...]]:
        """Part's name -> values that no later part uses."""
        last = {given.name: part.name for part in self.parts for given in part.inputs}
        return {part.name: tuple(name for name, user in last.items() if user == part.name) for part in self.parts}


def cut(graph: bytes, where: Path) -> GraphCut:
    """Return the parts of a decoder.

    Args:
        graph: The ONNX model, its weights in external data.
        where: Its path, for errors.

    Raises:
        InputError: it is no such model, is too large, or cannot be partitioned at its layers.
    """
    return _Cutting(read_graph(graph, where), where).cut()


class _Cutting:
    """The state of partitioning a graph."""

    def __init__(self, model: ModelProto, where: Path) -> None:
        self._where = where
        self._graph = model.graph
        self._header = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        self._initialisers = {tensor.name: tensor for tensor in model.graph.initializer}
        named = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._values = {value.name: value for value in named}
        self._wanted = {value.name for value in model.graph.output}
        self._nodes = list(model.graph.node)
        # Value that depends only on constants -> index of the node that computes it.
        self._fixed: dict[str, int] = {}
        self._parts: dict[str, list[NodeProto]] = {}
        for place, node in enumerate(self._nodes):
            if all(name in self._initialisers or name in self._fixed for name in node.input if name):
                self._fixed.update(dict.fromkeys(node.output, place))
            else:
                self._parts.setdefault(_part_of(node), []).append(node)
        self._before: dict[str, list[NodeProto]] = {}
        copied = 0
        for name, nodes in self._parts.items():
            self._before[name] = self._fixed_before(nodes)
            # Each part has its own copies of these.
            copied += len(self._before[name])
            if copied > MOST_NODES:
                raise self._strange(f"more than {MOST_NODES:,} nodes before its parts")
        self._users: dict[str, set[str]] = {}
        for name, nodes in self._parts.items():
            for given in (given for node in nodes for given in node.input):
                self._users.setdefault(given, set()).add(name)

    def cut(self) -> GraphCut:
        parts = self._parts
        layers = sorted((name for name in parts if name.startswith("layers.")), key=lambda name: int(name[7:]))
        if set(parts) - set(layers) != {"masks", "embedding", "head"} or not 1 <= len(layers) <= MAX_LAYERS:
            raise self._strange(f"parts {_listed(parts)}")
        consumers = Counter(name for layer in layers for name in self._initialisers_of(layer))
        shared = {name for name, count in consumers.items() if count > 1 and _is_external(self._initialisers[name])}
        made = {name: self._segment(name, shared) for name in ("masks", "embedding", *layers, "head")}
        known = {value.name for value in self._graph.input} | shared
        for name, segment in made.items():
            missing = {value.name for value in segment.inputs} - known
            if missing:
                raise self._strange(f"{name} wants {_listed(missing)} before it is known")
            known |= {value.name for value in segment.outputs}
        if made["masks"].weights:
            raise self._strange("weights outside of its layers")
        lookup = self._lookup(made["embedding"])
        return GraphCut(
            made["masks"],
            lookup,
            tuple(made[name] for name in layers),
            self._head(made["head"], lookup.weights[0].shape[0]),
            tuple(self._weight(self._initialisers[name]) for name in sorted(shared)),
        )

    def _segment(self, name: str, shared: Collection[str]) -> Segment:
        """Return a part, with the nodes that it uses and that depend only on constants."""
        nodes = [*self._before[name], *self._parts[name]]
        tensors = [self._initialisers[one] for one in self._initialisers_of(name) if one not in shared]
        wider = {node.input[0]: node.output[0] for node in nodes if self._widens(node)}
        nodes = [node for node in nodes if not self._widens(node)]
        made = {output for node in nodes for output in node.output if output}
        wanted = {one for one in made if one not in self._fixed and (one in self._wanted or self._taken(one, name))}
        weights = [self._weight(one, wider.get(one.name)) for one in tensors if _is_external(one)]
        known = made | {tensor.name for tensor in tensors} | {weight.name for weight in weights}
        taken = dict.fromkeys(given for node in nodes for given in node.input if given and given not in known)
        return Segment(
            name,
            self._header,
            tuple(nodes),
            tuple(tensor for tensor in tensors if not _is_external(tensor)),
            tuple(weights),
            tuple(self._value(one) for one in taken),
            tuple(self._value(one, shape=False) for one in sorted(wanted)),
        )

    def _taken(self, value: str, part: str) -> bool:
        """Return whether another part uses a value."""
        return bool(self._users.get(value, set()) - {part})

    def _widens(self, node: NodeProto) -> bool:
        """Return whether a node widens a float16 initialiser to float32, which every new session would repeat."""
        tensor = self._initialisers.get(node.input[0]) if node.op_type == "Cast" and node.input else None
        return (
            tensor is not None
            and tensor.data_type == TensorProto.FLOAT16
            and _is_external(tensor)
            and any(attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute)
        )

    def _lookup(self, segment: Segment) -> Segment:
        """Let the embedding's table have any number of rows."""
        rows = {weight.shape[0] for weight in segment.weights}
        kinds = {node.op_type for node in segment.nodes}
        if (
            not kinds <= LOOKUPS
            or len(rows) != 1
            or [value.name for value in segment.inputs] != [IDS]
            or len(segment.outputs) != 1
        ):
            raise self._strange("an embedding that is no table of rows")
        constants = []
        for tensor in segment.constants:
            values = self._values_of(tensor)
            if values.ndim == 1 and len(values) == 2 and values[0] in rows:
                values = np.array([-1, values[1]], values.dtype)
            constants.append(numpy_helper.from_array(values, tensor.name))
        return replace(segment, constants=tuple(constants))

    def _values_of(self, constant: TensorProto) -> NDArray[Any]:
        try:
            return numpy_helper.to_array(constant)
        except (ValueError, TypeError, KeyError) as error:
            raise self._strange(f"a constant {shown(constant.name)} that cannot be read ({error})") from error

    def _head(self, segment: Segment, count: int) -> tuple[Segment, ...]:
        """Split the head, which has `count` rows, if it is a multiplication that allows it."""
        rows = {weight.shape[0] for weight in segment.weights}
        products = [node for node in segment.nodes if node.op_type == PRODUCT]
        if [value.name for value in segment.outputs] != [LOGITS] or len(segment.inputs) != 1:
            raise self._strange("a head that is no product")
        if len(products) != 1:
            return (segment,)
        if rows != {count}:
            raise self._strange("a head of other rows than the embedding's")
        return tuple(segment.of_rows(first, min(HEAD_ROWS, count - first)) for first in range(0, count, HEAD_ROWS))

    def _initialisers_of(self, part: str) -> dict[str, None]:
        """Return the names of initialisers that a part and its constant nodes use, in order."""
        every = [*self._before[part], *self._parts[part]]
        return dict.fromkeys(name for node in every for name in node.input if name in self._initialisers)

    def _fixed_before(self, nodes: Iterable[NodeProto]) -> list[NodeProto]:
        """Return the nodes that depend only on constants and that the given nodes depend on, in order."""
        found, waiting = set[int](), [name for node in nodes for name in node.input]
        while waiting:
            place = self._fixed.get(waiting.pop())
            if place is not None and place not in found:
                found.add(place)
                waiting += self._nodes[place].input
        return [self._nodes[place] for place in sorted(found)]

    def _weight(self, tensor: TensorProto, wider: str | None = None) -> Weight:
        """Return an initialiser as it is used: in float32 under another name if it is widened."""
        held = External.of(tensor, self._where)
        size = prod(held.shape) * held.kind.itemsize
        if not size or held.size != size or not held.shape or held.shape[0] > MAX_WIDTH:
            raise self._strange(f"{tensor.name[:80]} of shape {shown(list(held.shape))} in {held.size:,} bytes")
        used = held.kind if wider is None else np.dtype(np.float32)
        return Weight(wider or tensor.name, held.shape, Span(held.start, size), held.kind, used)

    def _value(self, name: str, shape: bool = True) -> ValueInfoProto:
        """Return the type and shape of a value; without its shape if the shape will differ."""
        tensor = self._initialisers.get(name)
        if tensor is not None:
            return helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        if name not in self._values:
            raise self._strange(f"nothing is known of {name}")
        value = self._values[name]
        return value if shape else helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None)

    def _strange(self, what: str) -> InputError:
        return InputError(
            "the ONNX graph does not come apart at its layers", where=self._where, got=what,
            expected="what edge-exporter writes for the target onnx", next_step="restore it with edge-exporter unpack",
        )  # fmt: skip


def _listed(names: Collection[str], most: int = 8) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in sorted(names)[:most]) + more


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _part_of(node: NodeProto) -> str:
    layer = LAYER.match(node.name)
    if layer:
        return f"layers.{int(layer[1])}"
    return "embedding" if node.name.startswith(EMBEDDING) else "head" if node.name.startswith(HEAD) else "masks"
