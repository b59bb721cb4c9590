"""Models whose feed-forward widths differ from layer to layer, through both runtimes and as a Hugging Face folder."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.compression import Compression
from exporter.foundation.errors import RequestError
from exporter.model.folder import save_folder
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.widths import padded, selected
from exporter.planning.outline import zero_bytes
from exporter.prove.lowering import Decoded, check_stored_types, check_weights
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered, load_target, lower
from exporter.targets.gguf.feed_forward_widths import feed_forward_storage
from exporter.targets.opened import OpenedArtifact
from tests.models import FAMILIES, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (2, 48))
WIDTHS = {"even": (64, 64, 64), "uneven": (96, 32, 64)}


def with_widths(model: Model, widths: tuple[int, ...]) -> Model:
    chance = np.random.default_rng(1)
    return selected(model, [np.sort(chance.choice(96, width, replace=False)) for width in widths], {})


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    family = getattr(request, "param", "llama")
    with open_model(str(tiny_model(tmp_path / "model", family, layers=3, tied=family != "qwen2"))) as model:
        yield model


def made_of(model: Model, folder: Path, target: str, type: str, method: str = "rtn") -> Lowered:
    folder.mkdir()
    made = load_target(target)
    needed = method == "ldlq" or target == "onnx-qdq"
    windows = Windows.of(TOKENS, "file", 0)
    statistics = collect(model, windows, 0, lambda done, total: None) if needed else None
    decisions = made.decide(model, type, method)
    if statistics is None:
        compressed = Compression(model, decisions)
    else:
        given = made.rewritten(model, statistics, decisions)
        compressed = Compression(given.model, decisions, given.statistics, source=model)
    return lower(made, compressed, type, folder)


def logits(artifact: Artifact) -> np.ndarray:
    with OpenedArtifact(artifact, 64, 1, exact=True) as child:
        return np.stack([child.logits(tokens.tolist(), 0) for tokens in TOKENS])


def whole(folder: Path) -> np.ndarray:
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert module.dtype == torch.float32
    with torch.inference_mode():
        return module(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_float32_artifact_is_the_pruned_model(tmp_path: Path, source: Model, widths: str, target: str) -> None:
    pruned = with_widths(source, WIDTHS[widths])
    save_folder(pruned, tmp_path / "saved")
    expected = whole(tmp_path / "saved")
    carried = load_target(target).as_stored(pruned).model
    artifact = made_of(carried, tmp_path / "artifact", target, "F32").artifact
    # ggml looks GELU up in a table of float16.
    tabled = target == "gguf" and source.decoder.activation.startswith("gelu")
    np.testing.assert_allclose(logits(artifact), expected, rtol=0, atol=5e-3 if tabled else 2e-5)
    assert np.abs(logits(artifact) - whole(tmp_path / "model")).max() > 0.1


@pytest.mark.parametrize(
    ("target", "type", "method"),
    [("gguf", "F32", "rtn"), ("gguf", "Q8_0", "rtn"), ("gguf", "Q4_0", "ldlq"), ("onnx", "F32", "rtn"),
     ("onnx", "int4", "ldlq"), ("onnx", "int8", "rtn"), ("onnx-qdq", "a16w8", "rtn")],
)  # fmt: skip
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("source", ["llama", "qwen3"], indirect=True)
def test_the_artifact_holds_the_pruned_weights(
    tmp_path: Path, source: Model, widths: str, target: str, type: str, method: str
) -> None:
    made = load_target(target)
    carried = made.as_stored(with_widths(source, WIDTHS[widths])).model
    lowered = made_of(carried, tmp_path / "artifact", target, type, method)
    artifact = lowered.artifact
    assert check_weights(decoded_digests(artifact, carried), lowered).status == "passed"
    assert check_stored_types(made, lowered).status == "passed"
    flip(artifact)
    assert check_weights(decoded_digests(artifact, carried), lowered).status == "failed"


def flip(artifact: Artifact) -> None:
    """Change a code of the first matrix of an ONNX file, or of a query matrix of a GGUF file: no channel of zeros."""
    path, place = artifact.weights[-1], 1000
    if artifact.target == "gguf":
        (place,) = (t.data_offset + 5 for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def decoded_digests(artifact: Artifact, model: Model) -> dict[str, str]:
    decoded = Decoded(load_target(artifact.target).read_back(artifact, model))
    for group in model.groups():
        decoded(group)
    return decoded.digests


@pytest.mark.parametrize("source", ["llama", "mistral"], indirect=True)
def test_deci_computes_what_llama_does(tmp_path: Path, source: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = with_widths(source, WIDTHS["even"])
    plain = logits(made_of(pruned, tmp_path / "plain", "gguf", "F32").artifact)
    monkeypatch.setattr(type(pruned.decoder), "one_width", property(lambda self: False))
    as_deci = made_of(pruned, tmp_path / "deci", "gguf", "F32").artifact
    assert b"deci.feed_forward_length" in as_deci.weights[0].read_bytes()
    np.testing.assert_array_equal(logits(as_deci), plain)


def test_llama_reads_one_width_only(tmp_path: Path, source: Model) -> None:
    """What `deci` is for: the day that this fails, it is not needed any more."""
    uneven = with_widths(source, WIDTHS["uneven"])
    family = replace(source.decoder.family, gguf=replace(source.decoder.family.gguf, with_widths="llama"))
    uneven = replace(uneven, decoder=replace(uneven.decoder, family=family))
    artifact = made_of(uneven, tmp_path / "artifact", "gguf", "F32").artifact
    with pytest.raises(Exception, match=r"llama\.cpp cannot load the file"):
        logits(artifact)


@pytest.mark.parametrize("source", ["llama", "qwen2"], indirect=True)
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0"])
def test_named_mixes_of_the_pruned_model(tmp_path: Path, source: Model, mix: str) -> None:
    for name, widths in WIDTHS.items():
        carried = load_target("gguf").as_stored(with_widths(source, widths)).model
        lowered = made_of(carried, tmp_path / name, "gguf", mix)
        artifact = lowered.artifact
        assert check_stored_types(load_target("gguf"), lowered).status == "passed"
        assert np.isfinite(logits(artifact)).all()


@pytest.mark.parametrize(
    ("source", "widths", "architecture", "filled", "reason"),
    [
        ("llama", "even", "llama", False, "all layers are 64 wide"),
        ("llama", "uneven", "deci", False, "written as 'deci'"),
        ("mistral", "uneven", "deci", False, "written as 'deci'"),
        ("qwen2", "even", "qwen2", False, "all layers are 64 wide"),
        ("qwen2", "uneven", "qwen2", True, "zeros fill each up to 96"),
        ("qwen3", "uneven", "qwen3", True, "zeros fill each up to 96"),
    ],
    indirect=["source"],
)
def test_it_says_how_the_widths_are_carried(
    source: Model, widths: str, architecture: str, filled: bool, reason: str
) -> None:
    way = feed_forward_storage(with_widths(source, WIDTHS[widths]).decoder)
    assert (way.architecture, way.padded) == (architecture, filled)
    assert reason in way.reason


@pytest.mark.parametrize("source", ["qwen3"], indirect=True)
def test_zeros_are_refused_counted_and_carried(source: Model) -> None:
    target = load_target("gguf")
    pruned = with_widths(source, WIDTHS["uneven"])
    with pytest.raises(RequestError, match=r"widths of the layers differ.* zeros fill each up to 96"):
        target.decide(pruned, "Q8_0", "rtn")
    decisions = target.decide(target.as_stored(pruned).model, "Q8_0", "rtn")
    # 64 + 32 channels of three matrices, 64 weights each, 34 bytes for 32 weights.
    assert zero_bytes(pruned.decoder, decisions) == (64 + 32) * 3 * 64 * 34 // 32


def test_the_folder_loads_anywhere(tmp_path: Path, source: Model) -> None:
    pruned = with_widths(source, WIDTHS["uneven"])
    save_folder(pruned, tmp_path / "one")
    save_folder(pruned, tmp_path / "many", shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(whole(tmp_path / "one"), whole(tmp_path / "many"))
    for name in ("one", "many"):
        with open_model(str(tmp_path / name)) as again:
            assert again.decoder.intermediate == (96, 96, 96)
            assert (again.folder / "tokenizer.json").is_file()
            for group in padded(pruned).groups():
                np.testing.assert_array_equal(again.read(group.name), padded(pruned).read(group.name))


def test_a_folder_is_not_overwritten(tmp_path: Path, source: Model) -> None:
    with pytest.raises(RequestError, match="the folder exists already"):
        save_folder(source, tmp_path / "model")


def test_a_folder_that_cannot_be_written(tmp_path: Path, source: Model) -> None:
    with pytest.raises(RequestError, match=r"missing: there is no such folder; make it"):
        save_folder(source, tmp_path / "missing" / "saved")
    # Longer names than the file system's, while it is not complete.
    with pytest.raises(RequestError, match="the folder cannot be written"):
        save_folder(source, tmp_path / ("x" * 250))
    assert not list(tmp_path.glob("*xx*"))


def test_a_killed_save_leaves_nothing(tmp_path: Path, source: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "read", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_folder(source, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_done_is_in_the_digest(source: Model) -> None:
    pruned = with_widths(source, WIDTHS["uneven"])
    models = [source, pruned, padded(pruned), with_widths(source, WIDTHS["even"]), with_widths(pruned, (32, 32, 32))]
    assert len({model.digest for model in models}) == len(models)
    assert with_widths(source, WIDTHS["uneven"]).digest == pruned.digest


def test_a_down_in_place_of_the_source_s(tmp_path: Path, source: Model) -> None:
    kept = [np.arange(0, 96, 3)] * 3
    other = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    np.save(tmp_path / "down.npy", other)
    pruned = selected(source, kept, {1: tmp_path / "down.npy"})
    name = "model.layers.{}.mlp.down_proj.weight"
    np.testing.assert_array_equal(pruned.read(name.format(1)), other)
    np.testing.assert_array_equal(pruned.read(name.format(2)), source.read(name.format(2))[:, ::3])
    assert pruned.digest != selected(source, kept, {}).digest
