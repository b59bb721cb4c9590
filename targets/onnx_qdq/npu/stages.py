"""Cuts the artifact's graph into the stages of a pipeline, with the static shapes that neural processors need.

The division is that of Olive and winml-cli: embeddings and head run on the CPU, and so does attention. Everything else
of the layers goes to the neural processor, where norms and the residual stream stay in floating point:
the massive activations of some models (Sun et al. 2024) would make the steps of 16-bit codes too large.

All stages refer to the artifact's own data file, which therefore lies in their folder: ONNX allows external data beside
a graph or below it only, and onnxruntime-genai loads graphs beside its configuration only.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from exporter.foundation.errors import RequestError

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
HIDDEN_IN, HIDDEN_OUT = "input_hidden_states", "output_hidden_states"
PAST_LENGTH, TOTAL_LENGTH = "past_seq_len", "total_seq_len"
PAST, PRESENT = "past_key_values.", "present."
ATTENTION = "GroupQueryAttention"
# Its inputs with the number of earlier tokens and the length of keys and values.
ATTENTION_LENGTHS = {5: PAST_LENGTH, 6: TOTAL_LENGTH}
# Its inputs with the rotary tables, float32 [positions, half a head's rotary width].
ROTARY_TABLES = (7, 8)
SKIP_NORM, NORM = "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"
MASK_NODES, EMBEDDING_NODES, HEAD_NODES = "/model/attn_mask_reformat/", "/model/embed_tokens/", "/lm_head/"
# Tokens of the stage that reads prompts; what stock recipes use.
WINDOW = 64
EMBEDDINGS, CONTEXT, ITERATOR, HEAD = "embeddings", "context", "iterator", "head"
STAGES = (EMBEDDINGS, CONTEXT, ITERATOR, HEAD)
LAYER_STAGES = {CONTEXT: WINDOW, ITERATOR: 1}
# Longest cache: what stock recipes take.
MOST_LENGTH = 2048


def cache_length(context: int) -> int:
    """Return the tokens that keys and values have room for, whole windows of a model's context.

    Raises:
        RequestError: the context is shorter than a window.
    """
    if context < WINDOW:
        raise RequestError("the context is shorter than a window of the pipeline", got=context, expected=WINDOW)
    return min(context, MOST_LENGTH) // WINDOW * WINDOW


def graph_file(stage: str) -> str:
    """Return the name of a stage's graph."""
    return f"{stage}.onnx"


@dataclass(frozen=True)
class _Parts:
    """The nodes of a decoder's graph by stage, without those that reformat the attention mask."""

    embeddings: list[NodeProto]
    layers: list[NodeProto]
    head: list[NodeProto]


def cut(model: ModelProto, length: int) -> dict[str, ModelProto]:
    """Return the stages of a decoder by name.

    Args:
        model: The artifact's graph; its external data is not read.
        length: Tokens that keys and values have room for. It is fixed, so that onnxruntime refuses a shorter cache:
            onnxruntime-genai pads prompts to whole windows, and attention would write beyond the end of one.

    Raises:
        RequestError: the graph has an input or an operator for which the pipeline has no place.
    """
    graph = model.graph
    _require_known_inputs(graph)
    parts = _parts(graph.node)
    hidden = _only(_made(parts.embeddings) & _used(parts.layers), "the embedding")
    last = _only(_made(parts.layers) & _used(parts.head), "the last norm")
    names = {hidden: HIDDEN_IN, last: HIDDEN_OUT}
    width = _width(graph, parts.layers)
    making = _Making(model, names, _rotary_tables(parts.layers), length)
    layers = [made for node in parts.layers for made in _for_the_processor(node)]
    return {
        EMBEDDINGS: making.stage(EMBEDDINGS, parts.embeddings, [_tokens()], [_hidden(HIDDEN_IN, None, width)]),
        **{
            name: making.stage(name, layers, *_layer_values(graph, window, width, length))
            for name, window in LAYER_STAGES.items()
        },
        HEAD: making.stage(HEAD, parts.head, [_hidden(HIDDEN_OUT, None, width)], [_logits(graph)]),
    }


@dataclass(frozen=True)
class _Making:
    """What all stages take from the artifact's graph.

    Attributes:
        model: The artifact's graph.
        names: Value between two stages -> its name in the pipeline.
        rotary: Names of the rotary tables.
        length: Positions that the stages need of these.
    """

    model: ModelProto
    names: Mapping[str, str]
    rotary: Collection[str]
    length: int

    def stage(
        self, name: str, nodes: Iterable[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]
    ) -> ModelProto:
        """Return a stage with the constants and initialisers that its nodes use."""
        renamed = [self._renamed(node) for node in nodes]
        constants = {node.output[0]: node for node in self.model.graph.node if node.op_type == "Constant"}
        used = _used(renamed)
        needed = [node for value, node in constants.items() if value in used]
        tensors = [self._tensor(tensor) for tensor in self.model.graph.initializer if tensor.name in used]
        graph = helper.make_graph([*needed, *renamed], name, inputs, outputs, tensors)
        return helper.make_model(graph, ir_version=self.model.ir_version, opset_imports=self.model.opset_import)

    def _tensor(self, tensor: TensorProto) -> TensorProto:
        """Return an initialiser, in the stages' own folder; of rotary tables the first positions, the others unused."""
        made = TensorProto()
        made.CopyFrom(tensor)
        place = {entry.key: entry for entry in made.external_data}
        if place:
            place["location"].value = place["location"].value.rpartition("/")[2]
        if tensor.name in self.rotary and place and made.dims[0] > self.length:
            place["length"].value = str(int(place["length"].value) // made.dims[0] * self.length)
            made.dims[0] = self.length
        return made

    def _renamed(self, node: NodeProto) -> NodeProto:
        made = NodeProto()
        made.CopyFrom(node)
        for values in (made.input, made.output):
            for place, value in enumerate(values):
                values[place] = self.names.get(value, value)
        return made


def _parts(nodes: Iterable[NodeProto]) -> _Parts:
    parts = _Parts([], [], [])
    for node in nodes:
        if node.op_type == "Constant" or node.name.startswith(MASK_NODES):
            continue
        if node.name.startswith(EMBEDDING_NODES):
            parts.embeddings.append(node)
        elif node.name.startswith(HEAD_NODES):
            parts.head.append(node)
        else:
            parts.layers.append(node)
    return parts


def _rotary_tables(layers: Iterable[NodeProto]) -> set[str]:
    attentions = [node for node in layers if node.op_type == ATTENTION]
    return {node.input[place] for node in attentions for place in ROTARY_TABLES if place < len(node.input)} - {""}


def _for_the_processor(node: NodeProto) -> list[NodeProto]:
    """Return what replaces a node of a layer: lengths become inputs, and a residual addition leaves its norm."""
    if node.op_type == ATTENTION:
        attention = NodeProto()
        attention.CopyFrom(node)
        for place, length in ATTENTION_LENGTHS.items():
            attention.input[place] = length
        return [attention]
    if node.op_type != SKIP_NORM:
        return [node]
    if len(node.input) != 3:
        raise RequestError(
            "a residual addition of the graph has a bias, which the pipeline cannot hold", where=node.name
        )
    stream, added, gain = node.input
    total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.name}/sum"
    epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
    return [
        helper.make_node("Add", [stream, added], [total], name=f"{node.name}/Add"),
        helper.make_node(
            NORM, [total, gain], [node.output[0]], f"{node.name}/{NORM}", axis=-1, epsilon=epsilon, stash_type=1
        ),
    ]


def _layer_values(
    graph: GraphProto, window: int, width: int, length: int
) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Return inputs and outputs of the layers for a window of tokens."""
    lengths = [
        helper.make_tensor_value_info(PAST_LENGTH, TensorProto.INT32, [1, 1]),
        helper.make_tensor_value_info(TOTAL_LENGTH, TensorProto.INT32, [1]),
    ]
    past = [_cache(value, length) for value in graph.input if value.name.startswith(PAST)]
    present = [_cache(value, length) for value in graph.output if value.name.startswith(PRESENT)]
    return [_hidden(HIDDEN_IN, window, width), *lengths, *past], [_hidden(HIDDEN_OUT, window, width), *present]


def _cache(value: ValueInfoProto, length: int) -> ValueInfoProto:
    """Return keys or values of one sequence, float32 [1, heads, length, width]."""
    shape = value.type.tensor_type.shape
    heads, width = shape.dim[1].dim_value, shape.dim[3].dim_value or shape.dim[3].dim_param
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [1, heads, length, width])


def _tokens() -> ValueInfoProto:
    return helper.make_tensor_value_info(IDS, TensorProto.INT64, [1, "window"])


def _hidden(name: str, window: int | None, width: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "window" if window is None else window, width])


def _logits(graph: GraphProto) -> ValueInfoProto:
    (logits,) = (value for value in graph.output if value.name == LOGITS)
    vocab = logits.type.tensor_type.shape.dim[2].dim_value
    return helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [1, "window", vocab])


def _width(graph: GraphProto, layers: list[NodeProto]) -> int:
    """Return the width of the residual stream, which is that of the first norm's gain."""
    gain = next(node.input[1] for node in layers if node.op_type == NORM)
    return int(next(tensor.dims[0] for tensor in graph.initializer if tensor.name == gain))


def _require_known_inputs(graph: GraphProto) -> None:
    strange = [value.name for value in graph.input if value.name not in (IDS, MASK) and not value.name.startswith(PAST)]
    if strange:
        raise RequestError(
            "the pipeline for neural processors has no place for an input of the graph", got=strange[0],
            expected="tokens, and keys and values of attention",
        )  # fmt: skip


def _only(values: set[str], what: str) -> str:
    if len(values) != 1:
        raise RequestError(f"the graph cannot be cut after {what}", got=sorted(values)[:4], expected="one value")
    return values.pop()


def _made(nodes: Iterable[NodeProto]) -> set[str]:
    return {value for node in nodes for value in node.output if value}


def _used(nodes: Iterable[NodeProto]) -> set[str]:
    return {value for node in nodes for value in node.input if value}
