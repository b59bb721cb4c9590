"""Checks of an untrusted artifact before ONNX Runtime and onnxruntime-genai load it."""

from collections.abc import Collection
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from exporter.coding.container import SUFFIX, original_of, restored_chunks
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import from_json
from exporter.model.tokenizer_files import TOKENIZER
from exporter.targets.artifact import Artifact
from exporter.targets.intake import Read
from exporter.targets.onnx.settings import (
    CONFIGURATION,
    DATA_FILE,
    MODEL_FILE,
    TOKENIZER_SETTINGS,
    Decoder,
    GenaiConfig,
    TokenizerConfig,
)
from exporter.targets.onnx.tokenize import OTHER_TEMPLATES, TEMPLATE

# This exporter's settings files have some 2 kB. A graph of 126 layers, the most of any known model, has 2.2 MB. Parsed
# data can take a hundred times as much memory.
MOST_SETTINGS_BYTES, MOST_GRAPH_BYTES = 1 << 20, 4 << 20
MOST_PARTS, MOST_ATTRIBUTES = 50_000, 64
# Operators that only compute: none loads a library, reads a file, or holds a graph of its own.
OPERATORS: dict[str, frozenset[str]] = {
    "": frozenset({
        "Add", "Cast", "Concat", "Constant", "DequantizeLinear", "Gather", "Gelu", "MatMul", "Mul", "Pow",
        "QuantizeLinear", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "SimplifiedLayerNormalization", "Split",
        "Squeeze", "Sub", "Transpose",
    }),
    "com.microsoft": frozenset({
        "CausalConvWithState", "FastGelu", "GatherBlockQuantized", "Gelu", "GroupQueryAttention", "MatMulNBits",
        "QuickGelu", "SkipSimplifiedLayerNormalization",
    }),
}  # fmt: skip
# Fields that these messages may have; ONNX's other fields are for code and for instructions to runtimes.
FIELDS: dict[type[Message], frozenset[str]] = {
    ModelProto: frozenset({"ir_version", "opset_import", "producer_name", "producer_version", "graph"}),
    GraphProto: frozenset({"name", "node", "initializer", "input", "output", "value_info"}),
    NodeProto: frozenset({"name", "op_type", "domain", "input", "output", "attribute"}),
    AttributeProto: frozenset({"name", "type", "f", "i", "s", "t", "floats", "ints", "strings"}),
}
PLACE = {"location", "offset", "length"}
NEXT_STEP = "get the bundle again"


class OnnxIntake:
    """Accepts a graph with its data, settings and tokenizer; see `exporter.targets.intake.Intake`."""

    weights: tuple[str, ...] = (MODEL_FILE, DATA_FILE)
    required = 2

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """Return an artifact of rewritten settings and of links to the graph, its data and the tokenizer's files.

        ONNX Runtime follows links to a graph and its data in one folder. It opens no data outside that folder.
        """
        settings = from_json(GenaiConfig, read(CONFIGURATION, MOST_SETTINGS_BYTES), artifact.folder / CONFIGURATION)
        _check_graph(artifact, read, settings.model.decoder)
        (folder / CONFIGURATION).write_text(settings.to_text(), encoding="utf-8")
        if TOKENIZER_SETTINGS in names:
            given = read(TOKENIZER_SETTINGS, MOST_SETTINGS_BYTES)
            said = from_json(TokenizerConfig, given, artifact.folder / TOKENIZER_SETTINGS)
            (folder / TOKENIZER_SETTINGS).write_text(said.to_text(), encoding="utf-8")
        for name in names:
            if name in (TOKENIZER, TEMPLATE) or name.startswith(f"{OTHER_TEMPLATES}/"):
                _link(artifact.folder / name, folder / name)
        linked = tuple(_link(path, folder / path.relative_to(artifact.folder)) for path in artifact.weights)
        return Artifact(artifact.target, folder, linked, artifact.coded)


def _link(path: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(path.resolve())
    return place


def _check_graph(artifact: Artifact, read: Read, decoder: Decoder) -> None:
    where, data = artifact.weights
    place = data.relative_to(artifact.folder).as_posix().removesuffix(SUFFIX)
    if artifact.coded:
        size = original_of(where).size
        _require(size <= MOST_GRAPH_BYTES, where, "the graph is too large", size, f"at most {MOST_GRAPH_BYTES:,} bytes")
        graph, data_bytes = b"".join(restored_chunks(where)), original_of(data).size
    else:
        graph, data_bytes = read(MODEL_FILE, MOST_GRAPH_BYTES), data.stat().st_size
    try:
        model = ModelProto.FromString(graph)
    except DecodeError as error:
        raise InputError("this is no ONNX graph", where=where, got=error, next_step=NEXT_STEP) from error
    require_known(model, place, data_bytes, where)
    _require_shape(model.graph, decoder, where)


def require_known(model: ModelProto, data: str, data_bytes: int, where: Path) -> None:
    """Refuse a graph that has more than known operators on its own data.

    Args:
        model: The graph.
        data: Place of the data file below the graph's folder.
        data_bytes: Size of the data file.
        where: Path for errors.

    Raises:
        InputError: it has an operator, a function, a nested graph or a place of data that no written graph has.
    """
    graph, size = model.graph, model.ByteSize()
    _require(size <= MOST_GRAPH_BYTES, where, "the graph is too large", size, f"at most {MOST_GRAPH_BYTES:,} bytes")
    parts = len(graph.node) + len(graph.initializer) + len(graph.input) + len(graph.output) + len(graph.value_info)
    _require(parts <= MOST_PARTS, where, "the graph has too many parts", parts, f"at most {MOST_PARTS:,}")
    _require_fields(model, where)
    _require_fields(graph, where)
    domains = {opset.domain for opset in model.opset_import}
    _require(domains <= set(OPERATORS), where, "the graph has operators of another domain", sorted(domains)[:4])
    for node in graph.node:
        _require_operator(node, where)
    for tensor in graph.initializer:
        _require_place(tensor, data, data_bytes, where)


def _require_operator(node: NodeProto, where: Path) -> None:
    _require_fields(node, where)
    known = node.op_type in OPERATORS.get(node.domain, ())
    _require(known, where, "the graph has an operator that is not known here", f"{node.domain}:{node.op_type}"[:80])
    count = len(node.attribute)
    _require(count <= MOST_ATTRIBUTES, where, "an operator of the graph has too many attributes", count)
    for attribute in node.attribute:
        _require_fields(attribute, where)
        inside = not attribute.HasField("t") or not _is_elsewhere(attribute.t)
        _require(inside, where, "an operator of the graph takes its values from elsewhere", node.op_type)


def _require_fields(message: Message, where: Path) -> None:
    """Refuse fields that no written graph has: functions, graphs within operators, entries for a runtime, and so on."""
    known = FIELDS[type(message)]
    more = next((field.name for field, _ in message.ListFields() if field.name not in known), None)
    _require(more is None, where, f"the graph has another form of {type(message).__name__}", more, "no such field")


def _is_elsewhere(tensor: TensorProto) -> bool:
    return tensor.data_location != TensorProto.DEFAULT or bool(tensor.external_data)


def _require_place(tensor: TensorProto, data: str, data_bytes: int, where: Path) -> None:
    if not _is_elsewhere(tensor):
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    plain = len(place) == len(tensor.external_data) and set(place) == PLACE and place["location"] == data
    _require(plain, where, "a tensor of the graph lies outside its data file", place.get("location", "")[:80], data)
    numbers = [place[key] for key in ("offset", "length")]
    within = all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers)
    within = within and sum(map(int, numbers)) <= data_bytes
    _require(within, where, "a tensor of the graph lies beyond its data", f"{tensor.name[:80]} at {numbers}")


def _require_shape(graph: GraphProto, decoder: Decoder, where: Path) -> None:
    """Refuse a graph whose keys, values and states differ in shape from the settings, by which they are allocated."""
    past = [_sizes(value) for value in graph.input if value.name.startswith("past_key_values.")]
    heads = {sizes[1] if len(sizes) == 4 else None for sizes in past}
    found, expected = (len(past), heads), (2 * decoder.attention_layers, {decoder.num_key_value_heads})
    _require(found == expected, where, "the graph has other keys and values than the settings", found, expected)
    states = [_sizes(value)[1:] for value in graph.input if value.name.startswith("past.")]
    convolutions = decoder.num_hidden_layers - decoder.attention_layers
    wanted = [(decoder.hidden_size, decoder.conv_cache_size)] * convolutions
    _require(
        states == wanted, where, "the graph has other states of convolutions than the settings", states[:4], wanted[:4]
    )


def _sizes(value: ValueInfoProto) -> tuple[int, ...]:
    """Return the dimensions of a value; 0 for one that varies."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _require(holds: bool, where: Path, what: str, got: object = None, expected: object = None) -> None:
    if not holds:
        raise InputError(what, where=where, got=got, expected=expected, next_step=NEXT_STEP)


INTAKE = OnnxIntake()
