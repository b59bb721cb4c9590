"""What a device's processor is expected to make of a matrix: the roofline, and which kernels it has."""

from pathlib import Path
from typing import get_args

import pytest

from exporter.device.backend import ArmFeature, X86Feature
from exporter.device.profile import device_names, load_device
from exporter.model.sources import open_model
from exporter.predict.roofline import PRODUCTS_A_CYCLE, Cpu, Throughput, cpu_of
from exporter.targets.contract import load_target
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.gguf.target import ALPHABET as GGUF_ALPHABET
from exporter.targets.kernel_speeds import speed_files, speeds_on
from exporter.targets.onnx.target import ALPHABET as ONNX_ALPHABET
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
GGUF = "exporter.targets.gguf"


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
def test_every_format_that_may_be_chosen_has_a_speed_on_every_device(name: str) -> None:
    for package, alphabet in (("gguf", GGUF_ALPHABET), ("onnx", ONNX_ALPHABET)):
        speeds = speeds_on(f"exporter.targets.{package}", load_device(name).isa.features)
        assert set(alphabet) <= set(speeds)
        assert all(0 < one.decode < 2 and 0 < one.prefill < 2 for one in speeds.values())


@pytest.mark.parametrize("package", ["gguf", "onnx"])
def test_kernel_speeds_say_where_they_come_from(package: str) -> None:
    found = speed_files(f"exporter.targets.{package}")
    assert [one.order for one in found] == list(range(1, len(found) + 1))
    # The last is for all that are left, and only that one.
    assert [not one.features for one in found] == [False] * (len(found) - 1) + [True]
    kinds = get_args(ArmFeature) + get_args(X86Feature)
    for one in found:
        assert set(one.features) <= set(kinds)
        assert (ROOT / one.command.split()[3]).is_file() and one.source
        assert one.speeds.keys() == found[-1].speeds.keys()


def test_arm_is_quick_where_llama_cpp_repacks() -> None:
    def prefills(device: str) -> dict[str, float]:
        return {name: one.prefill for name, one in speeds_on(GGUF, load_device(device).isa.features).items()}

    repacked = {"Q4_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert {name for name, prefill in prefills("raspberry-pi-5").items() if prefill == 1.0} == repacked
    # Without dotprod nothing is repacked, and a prompt is as slow as single tokens.
    slow = speeds_on(GGUF, load_device("raspberry-pi-4").isa.features)
    assert all(one.prefill == one.decode for one in slow.values())


def test_only_the_last_token_of_a_prompt_goes_through_the_head(tmp_path: Path) -> None:
    target = load_target("gguf").on(load_device("core-ultra-200v"))
    usual = speeds_on(GGUF, load_device("core-ultra-200v").isa.features)["Q8_0"]
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        found = {group: target.throughput(group, ggml_format("Q8_0")) for group in model.groups()}
    assert {speed for group, speed in found.items() if group.layer is not None} == {usual}
    assert {speed for group, speed in found.items() if group.layer is None} == {Throughput(usual.decode, float("inf"))}


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
