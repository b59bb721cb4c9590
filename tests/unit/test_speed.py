"""What a device's processor is expected to make of a matrix: the roofline, and which kernels it has."""

from pathlib import Path

import pytest

from exporter.device.profile import device_names, load_device
from exporter.formats.ggml import ggml_format
from exporter.model.sources import open_model
from exporter.predict.roofline import PRODUCTS_A_CYCLE, Cpu, Throughput, cpu_of
from exporter.targets.gguf.kernel_speeds import ON_AVX512_VNNI, PLAIN_ON_ARM, REPACKED_ON_ARM, kernels_on
from exporter.targets.gguf.target import ALPHABET
from exporter.targets.target import load_target
from tests.models import tiny_model


def test_a_matrix_takes_the_longer_of_reading_and_multiplying() -> None:
    cpu = Cpu(bytes_per_s=10e9, products_per_s=40e9)
    assert cpu.decode_s(1_000_000, 500_000, Throughput(decode=1.0)) == pytest.approx(50e-6)
    assert cpu.decode_s(1_000_000, 500_000, Throughput(decode=0.1)) == pytest.approx(250e-6)
    assert cpu.prefill_s(1_000_000, Throughput(prefill=0.5)) == pytest.approx(50e-6)
    assert cpu.prefill_s(1_000_000, Throughput(prefill=float("inf"))) == 0


def test_threads_run_on_the_fastest_cores() -> None:
    device = load_device("galaxy-s24-ultra")
    clocks = [cluster.clock_ghz.value for cluster in device.clusters for _ in range(cluster.cores)]
    expected = PRODUCTS_A_CYCLE["i8mm"] * sum(clocks[: device.threads.count]) * 1e9
    assert cpu_of(device).products_per_s == pytest.approx(expected)
    assert cpu_of(device).bytes_per_s == device.cpu_bandwidth.value


@pytest.mark.parametrize("name", device_names())
def test_every_type_that_may_be_chosen_has_a_speed_on_every_device(name: str) -> None:
    kernels = kernels_on(load_device(name).isa.features)
    assert set(ALPHABET) <= set(kernels.layers)
    assert all(0 < one.decode < 2 and 0 < one.prefill < 2 for one in kernels.layers.values())
    for differing in (kernels.decode_in_down, kernels.decode_in_head):
        assert set(differing) <= set(ALPHABET)
        assert all(0 < decode < 2 for decode in differing.values())


def test_arm_is_quick_where_llama_cpp_repacks() -> None:
    known = kernels_on(load_device("raspberry-pi-5").isa.features).layers
    assert {name for name, one in known.items() if one.prefill == 1.0} == set(REPACKED_ON_ARM)
    assert known["Q5_1"].prefill == PLAIN_ON_ARM
    # Without dotprod nothing is repacked, and a prompt goes at the pace of single tokens.
    slow = kernels_on(load_device("raspberry-pi-4").isa.features).layers
    assert slow["Q4_0"].prefill == ON_AVX512_VNNI["Q4_0"].decode


def test_x86_is_as_quick_as_the_server_with_its_instructions() -> None:
    old, new = (kernels_on(load_device(name).isa.features) for name in ("core-i7-1185g7", "core-ultra-200v"))
    assert old.layers is ON_AVX512_VNNI
    assert not old.decode_in_down and not old.decode_in_head
    assert new.layers["Q4_0"].decode == pytest.approx(old.layers["Q4_0"].decode)
    assert new.layers["Q8_0"].decode < new.layers["Q5_1"].decode
    assert new.decode_in_head["Q8_0"] > new.decode_in_head["Q5_1"]


def test_head_and_down_projections_have_their_own_speed(tmp_path: Path) -> None:
    target = load_target("gguf").on(load_device("core-ultra-200v"))
    kernels = kernels_on(load_device("core-ultra-200v").isa.features)
    usual = kernels.layers["Q8_0"]
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        found = {group.role: target.throughput(group, ggml_format("Q8_0")) for group in model.groups()}
        head = next(group.role for group in model.groups() if group.layer is None)
        in_q4_k = [target.throughput(group, ggml_format("Q4_K")) for group in model.groups() if group.role == "down"]
    assert found["down"] == Throughput(kernels.decode_in_down["Q8_0"], usual.prefill)
    assert found[head] == Throughput(kernels.decode_in_head["Q8_0"], float("inf"))
    assert {found[role] for role in ("q", "k", "v", "o", "gate", "up")} == {usual}
    assert set(in_q4_k) == {kernels.layers["Q4_K"]}


@pytest.mark.parametrize(("target", "largest"), [("gguf", "Q8_0"), ("onnx", "int8-b32")])
def test_the_stock_tool_is_known_at_every_size(tmp_path: Path, target: str, largest: str) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        made = load_target(target)
        sizes = []
        for most in (1 << 30, sum(one.stored_bytes for one in made.stock(model, 1 << 30)) - 1):
            decisions = made.stock(model, most)
            sizes.append(sum(one.stored_bytes for one in decisions))
            assert sizes[-1] <= most and len(decisions) == len(model.groups())
        assert sizes[1] < sizes[0]
        assert {one.format.name.removesuffix("-f32") for one in made.stock(model, 1 << 30)} == {largest}
        assert made.stock(model, 1) == []
