"""Neural processors in profiles, the padding token, and what is said where something is missing."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.device.profile import device_names, load_device
from exporter.device.profile_writer import profile_toml
from exporter.foundation.errors import InputError, MissingDependencyError, RequestError
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from exporter.prove.arm64 import Loss
from exporter.prove.npu import Continuation, check_accuracy, check_tokens, least_kl
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.npu import npu_target
from exporter.targets.onnx_qdq.intake import INTAKE
from exporter.targets.onnx_qdq.npu import qualcomm
from exporter.targets.onnx_qdq.npu.padding import padding_token
from exporter.targets.onnx_qdq.npu.stages import cache_length
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
PROFILE = (ROOT / "devices/galaxy-s24-ultra.toml").read_text()


def test_the_extra_is_pinned_as_the_code_expects_it() -> None:
    pin = f"{qualcomm.PACKAGE}=={qualcomm.VERSION}"
    assert f'{qualcomm.EXTRA} = ["{pin};' in (ROOT / "pyproject.toml").read_text()
    assert pin in (ROOT / ".ci/constraints.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("value = 57", "value = 999", "the compiler knows no SoC of this number; got 999, expected 30 (SM8350)"),
        ("value = 57", "value = 43", "43 is another; got SM8650 (v75), expected SM8550 (v73)"),
        ('"Snapdragon 8 Gen 3 (SM8650)"', '"Exynos 2400"', "npu:htp contradicts soc: npu.soc is another; got SM8650"),
        ('(SM8650)"', '(SM8550)"', "npu:htp contradicts soc: npu.soc is another; got SM8650"),
        ('architecture = "v75"', 'architecture = "v79"', "npu.architecture contradicts processor; got v79"),
        ('name = "npu:htp"', 'name = "gpu:vulkan"', "gpu:vulkan has no neural processor of Qualcomm"),
    ],
)
def test_a_profile_that_contradicts_itself_is_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "galaxy-s24-ultra.toml"
    assert old in PROFILE
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises(InputError) as error:
        load_device(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_profiles_with_a_neural_processor_are_written_and_read_back(tmp_path: Path) -> None:
    found = 0
    for name in device_names():
        device = load_device(name)
        if any(backend.npu is not None for backend in device.backends):
            path = tmp_path / f"{name}.toml"
            path.write_text(profile_toml(device))
            assert load_device(str(path)) == device
            found += 1
    assert found == 13


def tokenizer(vocabulary: dict[str, int], added: list[str], byte_fallback: bool = False, template: str = ""):
    definition = {
        "model": {"vocab": vocabulary, "byte_fallback": byte_fallback},
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [{"content": name, "id": vocabulary[name], "special": True} for name in added],
    }
    roles = {"eos": vocabulary["<end>"]} if "<end>" in vocabulary else {}
    return SimpleNamespace(definition=definition, templates={"default": template}, roles=roles, where="folder")


def test_the_padding_token_is_one_that_no_text_gives() -> None:
    plain = {"a": 0, "<end>": 1}
    assert padding_token(tokenizer(plain, ["<end>"]), 4).token == 3
    assert padding_token(tokenizer(plain | {"ÿ": 2}, ["<end>"]), 3).token == 2
    assert padding_token(tokenizer(plain | {"<0xFF>": 2}, ["<end>"], byte_fallback=True), 3).token == 2
    spare = {**plain, "<spare>": 2, "<used>": 3}
    found = padding_token(tokenizer(spare, ["<end>", "<spare>", "<used>"], template="{{ '<used>' }}"), 4)
    assert found.token == 2
    assert "<spare>" not in json.dumps(found.definition["added_tokens"])
    with pytest.raises(RequestError, match="needs a padding token that no text gives"):
        padding_token(tokenizer(plain, ["<end>"]), 2)
    with pytest.raises(RequestError, match="needs a padding token"):
        padding_token(tokenizer({"ÿ": 0, "<end>": 1}, ["<end>"], byte_fallback=True), 2)


def test_caches_hold_whole_windows() -> None:
    assert [cache_length(context) for context in (64, 1000, 2048, 131072)] == [64, 960, 2048, 2048]
    with pytest.raises(RequestError, match="shorter than a window"):
        cache_length(63)


def test_a_missing_or_other_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(qualcomm, "version", absent)
    with pytest.raises(MissingDependencyError, match=r"not installed; pip install .*npu-qualcomm.*AI Stack License"):
        qualcomm.require_installed()
    monkeypatch.setattr(qualcomm, "version", lambda name: "9.9.9")
    monkeypatch.setattr(qualcomm.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(MissingDependencyError, match=r"another version; got 9\.9\.9, expected 2\.7\.0; pip install"):
        qualcomm.require_installed()


@pytest.mark.parametrize("data", [(), ("model.onnx.data", "npu/model.onnx.data")])
def test_a_bundle_has_one_data_file(tmp_path: Path, data: tuple[str, ...]) -> None:
    weights = tuple(tmp_path / name for name in ("model.onnx", *data))
    with pytest.raises(InputError, match="another number of data files than one"):
        INTAKE.admit(Artifact("onnx-qdq", tmp_path, weights), [], lambda name, most: b"", tmp_path)


def test_limits_of_the_checks() -> None:
    npu = npu_target("onnx-qdq")
    assert npu is not None and npu_target("gguf") is None

    def of(kl: float) -> Loss:
        return Loss(kl, 0.0, 1.0, 256)

    def status(here: float, there: float, added: float) -> str:
        return check_accuracy(npu, of(here), of(there), of(added)).checks[0].status

    assert status(0.02, 0.0230, 0.002) == "passed"
    assert status(0.02, 0.0232, 0.002) == "failed"
    assert status(0.02, 0.02, 0.011) == "failed"
    assert check_tokens([Continuation(5, 16, None), Continuation(70, 3, 0.004)]).status == "passed"
    assert check_tokens([Continuation(5, 16, None), Continuation(70, 3, 0.2)]).status == "failed"


@given(st.integers(0, 1 << 30))
def test_least_kl_of_two_tokens_that_change_places(seed: int) -> None:
    """No distribution that prefers the other token is nearer, and the nearest is as near as that."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, 5).astype(np.float32)
    first, other = (int(place) for place in np.argsort(logits)[[-1, -2]])
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    found = least_kl(logits, first, other)
    nearest = p.copy()
    nearest[[first, other]] = p[[first, other]].mean()
    assert found == pytest.approx(float((p * np.log(p / nearest)).sum()), rel=1e-9)
    for q in random.dirichlet(1e3 * nearest, 50):
        if q[other] >= q[first]:
            assert (p * np.log(p / q)).sum() >= found - 1e-12
    assert least_kl(logits, other, first) == 0.0


def test_least_kl_where_the_other_token_is_impossible() -> None:
    assert least_kl(np.array([0.0, -2000.0], np.float32), 0, 1) == pytest.approx(np.log(2))


def test_a_plan_counts_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    source = str(tiny_model(tmp_path / "model"))

    def needed(device: str) -> float:
        return plan(Job(source, device, "onnx-qdq", context=64)).disk_bytes.value

    def missing() -> None:
        raise MissingDependencyError("it is not installed", next_step=qualcomm.INSTALL)

    monkeypatch.setattr(qualcomm, "require_installed", missing)
    without = needed("galaxy-s24-ultra")
    assert without == needed("raspberry-pi-5")
    monkeypatch.setattr(qualcomm, "require_installed", lambda: None)
    with open_model(source) as model:
        stored = sum(
            one.stored_bytes
            for one in load_target("onnx-qdq").decide(model, "a16w8", "rtn")
            if one.group.layer is not None
        )
    assert needed("galaxy-s24-ultra") - without == pytest.approx(2.1 * stored, abs=1)
