"""Weights that stay coded in memory give the very logits of ONNX Runtime on the plain files."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.coding.container import PROFILES, SUFFIX, code_file
from exporter.coding.profiles import Profile
from exporter.compress.compression import Compression
from exporter.foundation.errors import InputError, RequestError
from exporter.model.sources import open_model
from exporter.targets.artifact import Artifact
from exporter.targets.coded_layout import layout_of
from exporter.targets.contract import load_target, lower
from exporter.targets.onnx import coded as coding
from exporter.targets.onnx import graph_partition
from exporter.targets.onnx.coded import CodedOnnxRuntime
from exporter.targets.onnx.runtime import OnnxRuntime
from tests.models import FAMILIES, VOCAB, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (4, 48))
PROMPT = TOKENS[0, :24].tolist()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of tiny models are coded too, and their heads cut."""
    monkeypatch.setattr(coding, "LEAST_BYTES", 1024)
    monkeypatch.setattr(graph_partition, "HEAD_ROWS", 128)


def lowered(folder: Path, type: str, to: Path) -> Artifact:
    target = load_target("onnx")
    with open_model(str(folder)) as model:
        statistics = collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)
        return lower(target, Compression(model, target.decide(model, type, "rtn"), statistics), type, to).artifact


def coded_form(artifact: Artifact, profile: Profile = "fast") -> Artifact:
    places = tuple(path.with_name(path.name + SUFFIX) for path in artifact.weights)
    for path, place in zip(artifact.weights, places, strict=True):
        code_file(path, place, profile, layout_of(path))
    return Artifact("onnx", artifact.folder, places, coded=True)


def opened(artifact: Artifact) -> CodedOnnxRuntime:
    return CodedOnnxRuntime(artifact, 128, 2, False, 1)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return lowered(tiny_model(tmp_path / "model"), "int8", tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type", ["int8", "int4", "int2-b16-asymmetric", "F32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts_are_those_of_the_plain_files(tmp_path: Path, family: str, type: str, tied: bool) -> None:
    plain_form = lowered(tiny_model(tmp_path / "model", family, tied=tied), type, tmp_path)
    if tied and type == "F32":
        # Its embedding's rows are the columns of the head's weights.
        with pytest.raises(InputError, match="got an embedding that is no table of rows"):
            opened(coded_form(plain_form))
        return
    plain = OnnxRuntime(plain_form, 128, 2, False, 1)
    coded = opened(coded_form(plain_form))
    for tokens, first in ((PROMPT, 0), (PROMPT[:1], 0), (PROMPT, 20)):
        assert np.array_equal(coded.logits(tokens, first), plain.logits(tokens, first))
    assert coded.generate(PROMPT, 12) == plain.generate(PROMPT, 12)
    # The head of quantised models is cut into three.
    assert coded.residence().coded_parts == 2 + (1 if type == "F32" else 3)
    assert coded.text(PROMPT) == plain.text(PROMPT)
    assert coded.tokenize("the capital") == plain.tokenize("the capital")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_changed_weight_changes_logits(artifact: Artifact, profile: Profile) -> None:
    before = opened(coded_form(artifact, profile)).logits(PROMPT)
    graph = onnx.load(str(artifact.folder / "model.onnx"), load_external_data=False).graph
    codes = next(tensor for tensor in graph.initializer if tensor.name.endswith("layers.1.mlp.up_proj.MatMul.codes"))
    (start,) = [int(entry.value) for entry in codes.external_data if entry.key == "offset"]
    data = bytearray((artifact.folder / "model.onnx.data").read_bytes())
    data[start] ^= 0x10
    (artifact.folder / "model.onnx.data").write_bytes(data)
    assert not np.array_equal(opened(coded_form(artifact, profile)).logits(PROMPT), before)


def test_kept_parts_leave_the_logits_as_they_are(artifact: Artifact) -> None:
    runtime = opened(coded_form(artifact))
    logits, before = runtime.logits(PROMPT), runtime.residence()
    assert (before.coded_parts, before.plain_parts) == (5, 0)
    runtime.keep_up(1e-3)
    assert runtime.residence().plain_parts == 0
    with pytest.raises(RequestError, match=r"slower than that on this machine; got .* tokens/s with all"):
        runtime.keep_up(1e9)
    assert np.array_equal(runtime.logits(PROMPT), logits)
    after = runtime.residence()
    assert (after.coded_parts, after.plain_parts) == (0, 5)
    runtime.keep_up(0)
    assert np.array_equal(runtime.logits(PROMPT), logits)
    assert runtime.residence().plain_parts == 0


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_changed_file_is_refused(artifact: Artifact, name: str) -> None:
    coded = coded_form(artifact)
    path = artifact.folder / (name + SUFFIX)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="the coded file is damaged"):
            opened(coded)


def test_a_file_that_changes_in_use_is_refused(artifact: Artifact) -> None:
    coded = coded_form(artifact)
    runtime = opened(coded)
    with pytest.raises(RequestError):
        runtime.keep_up(1e9)
    path = artifact.folder / "model.onnx.data.coded"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="the coded file is damaged"):
        runtime.keep_up(0)


def rewritten(artifact: Artifact, change: object) -> Artifact:
    path = artifact.folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model.graph)  # type: ignore[operator]
    path.write_bytes(model.SerializeToString())
    return coded_form(artifact)


def other_names(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = node.name.replace("/lm_head/", "/output/")


def other_order(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = node.name.replace("layers.0", "layers.7")


def fewer_words(graph: onnx.GraphProto) -> None:
    """The head takes half of the codes."""
    head = next(node for node in graph.node if node.name.startswith("/lm_head/"))
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    half = onnx.TensorProto()
    half.CopyFrom(tensors[head.input[1]])
    half.name = "half"
    half.dims[0] //= 2
    for entry in half.external_data:
        if entry.key == "length":
            entry.value = str(int(entry.value) // 2)
    graph.initializer.append(half)
    head.input[1] = "half"


def far_away(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("gate_proj.MatMul.codes"))
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(1 << 40)


def too_long(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name.endswith("gate_proj.MatMul.codes"))
    tensor.dims[0] *= 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_names, "the ONNX graph does not come apart at its layers; got parts embedding, layers.0"),
        (other_order, "does not come apart at its layers; got layers.1 wants .* before it is known"),
        (fewer_words, "got a head of other rows"),
        (far_away, "a coded file holds no such array; got bytes 1,099,511,627,776 to"),
        (too_long, "does not come apart at its layers; got model.layers.0.mlp.gate_proj.MatMul.codes of shape"),
    ],
)
def test_graphs_of_others_are_refused(artifact: Artifact, change: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        opened(rewritten(artifact, change))


def test_a_graph_that_is_none_is_refused(artifact: Artifact) -> None:
    coded = coded_form(artifact)
    graph = artifact.folder / "model.onnx"
    graph.write_bytes(b"\x0a\xff\xff\xff\xff")
    code_file(graph, artifact.folder / "model.onnx.coded", "fast", [])
    with pytest.raises(InputError, match="the ONNX file is truncated or damaged"):
        opened(coded)


def test_tokens_outside_of_the_vocabulary_are_refused(artifact: Artifact) -> None:
    runtime = opened(coded_form(artifact))
    for token in (-1, VOCAB):
        with pytest.raises(InputError, match="the model has no such token"):
            runtime.logits([5, token])
