"""Low-rank factors in both targets: the planned sum from the artifact's bytes, and in the runtime's own answers."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest

from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress.caldera import Alternation
from exporter.compress.checks import with_factors
from exporter.compress.compression import Compression, compress
from exporter.foundation.errors import InputError, RequestError
from exporter.model.gguf_names import interleaved_rows
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, dequantised, distance
from exporter.prove.lowering import Decoded, check_stored_types, check_weights
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered, load_target, low_rank, lower
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (2, 48))
TYPES = {"gguf": "Q4_0", "onnx": "int4"}
FAMILIES = ["llama", "qwen2", "qwen3"]
ATTENTION = ("q", "o")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tiny_model(tmp_path_factory.mktemp("models") / family, family, tied=family != "qwen2")
    with open_model(str(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def statistics(model: Model) -> Statistics:
    return collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)


def made_of(
    model: Model, statistics: Statistics, folder: Path, target: str, bits: int, roles: tuple[str, ...] = ()
) -> Lowered:
    folder.mkdir()
    made = load_target(target)
    decisions = made.decide(model, TYPES[target], "ldlq")
    factors = low_rank(made, 32, bits)
    decisions = with_factors(decisions, factors, roles) if roles else with_factors(decisions, factors)
    compressed = Compression(model, decisions, statistics, alternation=Alternation(iterations=1))
    return lower(made, compressed, TYPES[target], folder)


def decoded(artifact: Artifact, model: Model) -> dict[str, str]:
    found = Decoded(load_target(artifact.target).read_back(artifact, model))
    for group in model.groups():
        found(group)
    return found.digests


def kl_to_own_weights(model: Model, artifact: Artifact, planned: Artifact | None = None) -> float:
    """Return the KL of an artifact in its runtime from a float model with its own weights, or with another's."""
    weights = load_target(artifact.target).read_back(planned or artifact, model)
    own = Reference.of(dequantised(model, weights), TOKENS)
    with OpenedArtifact(artifact, 64, 1, exact=True) as child:
        return distance(own, child.logits).kl_mean


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_the_artifact_holds_matrices_and_factors_as_planned(
    model: Model, statistics: Statistics, tmp_path: Path, target: str, bits: int
) -> None:
    lowered = made_of(model, statistics, tmp_path / "artifact", target, bits)
    artifact = lowered.artifact
    assert check_weights(decoded(artifact, model), lowered).status == "passed"
    assert check_stored_types(load_target(target), lowered).status == "passed"
    stored = load_target(target).stored_types(artifact, model)
    ending = f"+{low_rank(load_target(target), 32, bits).name}"
    assert sum(name.endswith(ending) for name in stored.values()) == 14
    matrices = sum(decision.stored_bytes for decision in lowered.compression.decided)
    vectors = 4 * sum(int(np.prod(shape)) for shape in model.decoder.vectors().values())
    assert matrices + vectors < artifact.file_bytes < matrices + vectors + 150_000
    again = made_of(model, statistics, tmp_path / "again", target, bits).artifact
    for one, other in zip(artifact.weights, again.weights, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_flipped_nibble_of_a_factor_is_seen(
    model: Model, statistics: Statistics, tmp_path: Path, target: str, bits: int, side: str
) -> None:
    lowered = made_of(model, statistics, tmp_path / "artifact", target, bits)
    artifact = lowered.artifact
    part = factor(artifact, "up", side)
    part[3, 5] ^= 0x10
    part.flush()
    check = check_weights(decoded(artifact, model), lowered)
    assert check.status == "failed"
    assert "model.layers.1.mlp.up_proj.weight" in check.detail


def factor(artifact: Artifact, role: str, side: str) -> np.memmap:
    """Return the bytes of L or R of layer 1 as they lie in the file, past the scale where there is one."""
    if artifact.target == "gguf":
        name = {"up": "ffn_up", "q": "attn_q"}[role]
        tensors = gguf.GGUFReader(artifact.folder / "adapter.gguf", "r+").tensors
        wanted = f"blk.1.{name}.weight.{'lora_b' if side == 'left' else 'lora_a'}"
        (tensor,) = (t for t in tensors if t.name == wanted)
        return tensor.data.view(np.uint8)
    graph = onnx.load_model(str(artifact.weights[0]), load_external_data=False).graph
    stem = f"model.layers.1.{'attn' if role == 'q' else 'mlp'}.{role}_proj.{side}"
    (tensor,) = (t for t in graph.initializer if t.name in (f"{stem}.codes", f"{stem}.weight"))
    where = {entry.key: entry.value for entry in tensor.external_data}
    size = int(where["length"])
    rows = tensor.dims[0]
    return np.memmap(artifact.weights[1], np.uint8, "r+", offset=int(where["offset"]), shape=(rows, size // rows))


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_the_runtime_multiplies_with_the_planned_sum(
    model: Model, statistics: Statistics, tmp_path: Path, target: str
) -> None:
    artifact = made_of(model, statistics, tmp_path / "artifact", target, 16).artifact
    base = load_target(target).decide(model, TYPES[target], "ldlq")
    (tmp_path / "base").mkdir()
    plain = lower(load_target(target), Compression(model, base, statistics), TYPES[target], tmp_path / "base").artifact
    rounding, own = kl_to_own_weights(model, plain), kl_to_own_weights(model, artifact)
    assert own < 2 * rounding
    # The factors matter, so that leaving them out would be seen.
    assert kl_to_own_weights(model, plain, artifact) > 3 * rounding


def test_rows_of_the_querys_left_factor_in_the_wrong_order_are_seen(
    model: Model, statistics: Statistics, tmp_path: Path, family: str
) -> None:
    artifact = made_of(model, statistics, tmp_path / "artifact", "gguf", 16).artifact
    planned = tmp_path / "planned"
    artifact.folder.rename(planned)
    moved = made_of(model, statistics, tmp_path / "artifact", "gguf", 16).artifact
    left = factor(moved, "q", "left")
    left[:] = left[interleaved_rows(len(left), 4)]
    left.flush()
    kept = Artifact("gguf", planned, tuple(planned / path.name for path in artifact.weights))
    assert kl_to_own_weights(model, moved, kept) > 1.5 * kl_to_own_weights(model, kept)


def test_query_key_and_value_come_apart_where_only_one_has_factors(
    model: Model, statistics: Statistics, tmp_path: Path
) -> None:
    lowered = made_of(model, statistics, tmp_path / "artifact", "onnx", 8, ATTENTION)
    artifact = lowered.artifact
    assert check_weights(decoded(artifact, model), lowered).status == "passed"
    names = [node.name for node in onnx.load_model(str(artifact.weights[0]), load_external_data=False).graph.node]
    assert "/model/layers.0/attn/q_proj/left/MatMulNBits" in names
    assert not [name for name in names if "qkv_proj" in name]
    assert kl_to_own_weights(model, artifact) < 0.05


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_adapter_that_llama_cpp_refuses_is_an_error(model: Model, statistics: Statistics, tmp_path: Path) -> None:
    artifact = made_of(model, statistics, tmp_path / "artifact", "gguf", 8).artifact
    path = artifact.folder / "adapter.gguf"
    path.write_bytes(path.read_bytes().replace(b"lora_b", b"lora_c"))
    with pytest.raises(InputError, match="cannot load the adapter"), OpenedArtifact(artifact, 64, 1) as child:
        child.ready()


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_cannot_carry_factors_is_refused_at_plan_time(model: Model) -> None:
    target = load_target("gguf")
    decisions = target.decide(model, "Q4_0", "ldlq")
    factors = low_rank(target, 32, 8)
    with pytest.raises(RequestError, match="embedding and head carry no factors"):
        with_factors(decisions, factors, ["embedding"])
    with pytest.raises(RequestError, match="rank is not one that the matrix has"):
        with_factors(decisions, low_rank(target, 64, 8))  # key and value have 32 rows
    with pytest.raises(RequestError, match=r"factors in Q8_0 cannot have rows of 24 weights"):
        with_factors(decisions, low_rank(target, 24, 8))
    with_factors(decisions, low_rank(target, 24, 16))
    with pytest.raises(RequestError, match="carries no low-rank factors of 2 bits"):
        low_rank(target, 32, 2)
    with pytest.raises(RequestError, match="onnx-qdq carries no low-rank factors"):
        low_rank(load_target("onnx-qdq"), 32, 8)
    with pytest.raises(RequestError, match="factors beside F32 would only take room"):
        with_factors(target.decide(model, "F32", "rtn"), factors)
    compressed = Compression(model, with_factors(decisions, factors))
    with pytest.raises(RequestError, match="cannot be fitted to inputs that were not observed"):
        list(compress(compressed))
