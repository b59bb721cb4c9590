"""What a backend computes as the file holds it, and the formats that are chosen for it."""

import re
from pathlib import Path

import gguf
import pytest

from exporter.device.profile import DeviceProfile, load_device
from exporter.formats.group import Decision
from exporter.foundation.config_files import read_document
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from exporter.planning.resolve import ResolvedJob, resolve
from exporter.targets.artifact import target_names
from exporter.targets.backends import FILE, ComputedFile, formats_on
from tests.models import tiny_model

PHONE = "galaxy-s24-ultra"
FILES = sorted(Path(__file__).parents[2].glob(f"targets/*/{FILE}"))


def asked(folder: Path, **options: object) -> Job:
    return Job(str(folder), PHONE, "gguf", context=64, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", hidden=256, intermediate=512)


def drafted(job: Job) -> tuple[ResolvedJob, list[Decision], Model]:
    with open_model(job.source) as model:
        resolved = resolve(job, model)
        return resolved, resolved.draft().decisions, model


@pytest.mark.parametrize("file", FILES, ids=[file.parent.name for file in FILES])
def test_the_files_name_formats_of_their_target(file: Path) -> None:
    found = read_document(file, ComputedFile, "file").backends
    assert len({one.name for one in found}) == len(found)
    for one in found:
        if file.parent.name == "gguf":
            assert {*one.computes, *one.rounds} <= set(gguf.GGMLQuantizationType.__members__)
        assert not set(one.computes) & set(one.rounds)
        assert one.source and re.search(r"\d+\.\d+", one.runtime)


def test_the_cpu_computes_every_format_of_every_target() -> None:
    for target in target_names():
        cpu = formats_on("cpu", target)
        assert cpu.computes("anything") and cpu.check([]) == ()


@pytest.mark.parametrize("prefer", ["accuracy", "balanced", "speed"])
def test_a_budget_chooses_only_formats_that_the_backend_computes(folder: Path, prefer: str) -> None:
    known = formats_on("npu:htp", "gguf").known
    assert known is not None
    resolved, decisions, _ = drafted(asked(folder, bits=5.6, backend="npu:htp", prefer=prefer))
    assert {one.format.name for one in decisions} <= set(known.computes)
    _, freely, _ = drafted(asked(folder, bits=3.8, prefer="accuracy"))
    assert {one.format.name for one in freely} - set(known.computes)
    (check,) = resolved.backend.check(decisions)
    assert check.status == "passed" and known.source in check.detail


def test_a_type_that_it_does_not_take_is_refused_with_the_nearest_that_it_does(folder: Path) -> None:
    with pytest.raises(RequestError) as refused:
        drafted(asked(folder, type="IQ4_XS", backend="npu:htp"))
    told = str(refused.value)
    assert "npu:htp does not compute these formats as they are; got IQ4_XS (left to the CPU), expected" in told
    advised = re.search(r"take --type (\w+), or a limit such as --max-file-bytes, which chooses among those", told)
    assert advised is not None
    _, usual, _ = drafted(asked(folder, type="IQ4_XS"))
    _, named, _ = drafted(asked(folder, type=advised[1], backend="npu:htp"))
    sizes = [sum(one.stored_bytes for one in some) for some in (usual, named)]
    assert abs(sizes[1] - sizes[0]) < 0.1 * sizes[0]


@pytest.mark.parametrize("type", ["a16w8", "a16w4"])
def test_all_formats_of_a_target_for_neural_processors_are_computed(folder: Path, type: str) -> None:
    resolved, decisions, _ = drafted(Job(str(folder), PHONE, "onnx-qdq", type, context=64, backend="npu:htp"))
    (check,) = resolved.backend.check(decisions)
    assert "onnxruntime-qnn" in check.detail and "int8-channel" in check.detail


def test_what_it_rounds_again_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"npu:openvino computes no format .*Q6_K \(rounded again to 4 bits"):
        drafted(Job(str(folder), "core-ultra-155h", "gguf", "Q6_K", context=64, backend="npu:openvino"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"target": "onnx", "backend": "npu:htp"},
            r"not known what npu:htp computes of the target onnx",
        ),
        ({"backend": "npu:ane"}, r"galaxy-s24-ultra: the device has no backend 'npu:ane'; known: cpu, gpu:opencl"),
        ({"backend": "x\n"}, r"has no backend"),
    ],
)
def test_a_backend_of_which_nothing_is_known_is_refused(folder: Path, options: dict[str, str], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        drafted(Job(str(folder), PHONE, **{"target": "gguf", "context": 64, **options}))  # type: ignore[arg-type]


def test_what_is_expected_is_that_of_the_backend(folder: Path) -> None:
    made = plan(asked(folder, bits=6.0, backend="npu:htp"))
    assert any(check.name == "device.backend" for check in made.checks)


def test_a_preferred_backend_is_one_of_the_device() -> None:
    table = load_device(PHONE).model_dump()
    table["preferred"]["backend"] = "npu:htp"
    assert DeviceProfile.model_validate(table).preferred.backend == "npu:htp"
    table["preferred"]["backend"] = "npu:ane"
    with pytest.raises(ValueError, match=r"preferred.backend is none of the backends"):
        DeviceProfile.model_validate(table)
