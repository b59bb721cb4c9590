"""What schema 2 of profiles refuses: unit mistakes, impossible backends, sizes and runs; and `devices` as a command."""

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.device.profile import DeviceProfile, device_names, load_device
from exporter.device.profile_writer import profile_toml
from exporter.foundation.config_files import checked
from exporter.foundation.errors import InputError, RequestError
from tests.commands import cli, printed

GIB = 1 << 30


def fact(value: float) -> dict[str, Any]:
    return {"value": value, "basis": "published", "source": "data sheet"}


CPU = {"name": "cpu", "usable_bandwidth_bytes_per_s": fact(10e9)}
CARD = {"name": "gpu:cuda", "peak_bandwidth_bytes_per_s": fact(9e11)}
RUN = {
    "backend": "cpu", "format": "Q4_0", "file_bytes": 700_000_000, "parameters": 1_240_000_000,
    "decode_tokens_per_s": 13.5, "basis": "measured", "source": "llama-bench",
}  # fmt: skip
KERNEL = {"family": "q4", "repacked": True, "feature": "dotprod", "prefill_operations_per_s": fact(2e11)}


def profile(**changes: Any) -> DeviceProfile:
    """Return an 8 GiB board with changes, `None` for what is to be left out."""
    facts: dict[str, Any] = {
        "schema_version": 2,
        "name": "my-board",
        "title": "My board",
        "device_class": "board",
        "soc": "BCM2712",
        "os": "Linux",
        "clusters": [{"name": "big", "cores": 4, "clock_ghz": fact(2.4)}],
        "isa": {"features": ["neon", "dotprod"], "basis": "published", "source": "cpuinfo"},
        "ram_bytes": fact(8 * GIB),
        "app_memory_limit_bytes": fact(7e9),
        "peak_bandwidth_bytes_per_s": fact(17.1e9),
        "preferred": {"target": "gguf", "reason": "kernels"},
        "threads": {"count": 4, "reason": "all cores"},
        "backends": [CPU],
    }
    table = {key: value for key, value in (facts | changes).items() if value is not None}
    return checked(table, DeviceProfile, "my-board.toml")


def sizes(*values: float) -> dict[str, Any]:
    return {"values": list(values), "basis": "published", "source": "a shop"}


def test_all_that_may_be_known_is_read_and_written(tmp_path: Path) -> None:
    gpu = {
        "name": "gpu:vulkan", "processor": "VideoCore \\ \"VII\"", "cores": 12, "peak_operations_per_s": fact(1e11),
        "peak_bandwidth_bytes_per_s": fact(20e9), "usable_bandwidth_bytes_per_s": fact(18e9),
        "memory_limit_bytes": fact(2 * GIB), "fixed_seconds_per_token": fact(0.002), "decode_watts": fact(7.5),
    }  # fmt: skip
    made = profile(
        ram_options_bytes=sizes(4 * GIB, 8 * GIB),
        storage_read_bytes_per_s=fact(90e6),
        sustained_factor=fact(0.7),
        idle_watts=fact(2.7),
        power_limit_watts=fact(25),
        backends=[CPU | {"kernels": [KERNEL, KERNEL | {"repacked": False, "decode_ratio": fact(0.9)}]}, gpu],
        measured=[RUN, RUN | {"backend": "gpu:vulkan", "read_bytes": 600_000_000, "peak_bytes": 1 << 30}],
    )
    assert made.backend("gpu:vulkan").fixed_seconds_per_token == made.backends[1].fixed_seconds_per_token
    assert made.measured[1].drawn_bytes_per_s == pytest.approx(13.5 * 600_000_000)
    file = tmp_path / "my-board.toml"
    file.write_text(profile_toml(made), encoding="utf-8")
    assert load_device(str(file)) == made


def test_a_backend_that_a_device_lacks_is_named() -> None:
    with pytest.raises(RequestError, match=r"my-board: the device has no backend 'npu:htp'; known: cpu\."):
        profile().backend("npu:htp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ram_bytes": fact(8)}, r"ram_bytes: .*got 8, expected 64 MiB.*; if it is in GiB, write 8_589_934_592\."),
        ({"ram_bytes": fact(8192)}, r"ram_bytes: .*got 8,192, .*; if it is in MiB, write 8_589_934_592\."),
        ({"ram_bytes": fact(8 << 20)}, r"ram_bytes: .*; if it is in KiB, write 8_589_934_592\."),
        ({"ram_bytes": fact(8e9)}, r"this is GB, and memory is sold in GiB; got 8,000.*; if it is 8 GiB, write 8_5"),
        ({"ram_options_bytes": sizes(4e9, 8 * GIB)}, r"ram_options_bytes: this is GB.*; if it is 4 GiB, write 4_294_"),
        ({"ram_options_bytes": sizes(4, 8)}, r"ram_options_bytes: a size is impossible; got 4, expected 64 MiB to 1"),
        ({"ram_options_bytes": sizes(8 * GIB, 4 * GIB)}, r"the sizes are not in order; got a larger .*, expected each"),
        ({"ram_options_bytes": sizes(4 * GIB, 16 * GIB)}, r"none of ram_options_bytes; got 8,589,.*one of 4,294,967"),
        ({"app_memory_limit_bytes": fact(3000)}, r"app_memory_limit_bytes: .*; if it is in MiB, write 3_145_728_000\."),
        ({"app_memory_limit_bytes": fact(3e6)}, r"app_memory_limit_bytes: .*; if it is in KiB, write 3_072_000_000\."),
        ({"app_memory_limit_bytes": fact(16 * GIB)}, r"app_memory_limit_bytes exceeds ram_bytes; got 17,179,869,184, "),
        ({"peak_bandwidth_bytes_per_s": fact(17.1)}, r"got 17.1, .*; if it is in GB/s, write 17_100_000_000\."),
        ({"peak_bandwidth_bytes_per_s": fact(17100)}, r"got 17,100, .*; if it is in MB/s, write 17_100_000_000\."),
        ({"peak_bandwidth_bytes_per_s": fact(-1)}, r"got -1, expected 0.5e9 to 5e12 bytes/s\.$"),
        ({"storage_read_bytes_per_s": fact(7)}, r"storage_read.*; if it is in GB/s, write 7_000_000_000\."),
        ({"storage_read_bytes_per_s": fact(90e9)}, r"storage_read_bytes_per_s exceeds peak_bandwidth_bytes_per_s; got"),
        ({"sustained_factor": fact(70)}, r"sustained_factor: .*got 70, expected a share .* in percent, write 0.7"),
        ({"idle_watts": fact(2700)}, r"idle_watts: .*got 2,700, expected 0.1 to 2,000 watts; .* milliwatts, .*2.7"),
        ({"idle_watts": fact(9), "power_limit_watts": fact(5)}, r"idle_watts exceeds power_limit_watts; got 9"),
        (
            {"clusters": [{"name": "big", "cores": 4, "clock_ghz": fact(2400)}]},
            r"clusters\[0\].clock_ghz: .*got 2,400, expected 0.1 to 7 GHz; if it is in MHz, write 2.4\.",
        ),
    ],
)  # fmt: skip
def test_unit_mistakes_and_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        profile(**changes)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("my-board.toml: ")


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        ([], r"backends: the value is wrong; got \[\], expected .*at least 1"),
        ([CPU, CPU], r"a backend is listed twice; got cpu, cpu, expected each backend once"),
        ([{"name": "gpu:cuda"}], r"no backend named cpu has a usable_bandwidth.*got gpu:cuda, expected a \[\[ba"),
        ([{"name": "cpu"}], r"no backend named cpu has a usable_bandwidth_bytes_per_s; got cpu"),
        ([CPU, {"name": "gpu"}], r"backends\[1\].name: the value is wrong; got 'gpu', expected 'cpu', 'gpu:cuda'"),
        ([CPU | {"kernel": []}], r"backends\[0\]: unknown key 'kernel'; did you mean 'kernels'\?"),
        ([CPU | {"kernels": [KERNEL, KERNEL]}], r"backends\[0\]: a kernel is listed twice; got q4, expected each"),
        ([CPU | {"kernels": [{"family": "q4"}]}], r"kernels\[0\]: the kernel has no number; got none, expected pref"),
        ([CPU | {"kernels": [KERNEL | {"famly": 1}]}], r"kernels\[0\]: unknown key 'famly'; did you mean 'family'\?"),
        (
            [CPU | {"kernels": [KERNEL | {"feature": "i8mm"}]}],
            r"a kernel of the CPU uses what isa lacks; got i8mm, expected one of neon, dotprod",
        ),
        (
            [CPU | {"kernels": [{"family": "q4", "prefill_operations_per_s": fact(0.2)}]}],
            r"kernels\[0\].prefill_operations_per_s: .*got 0.2, .*; if it is in TOPS, write 200_000_000_000\.",
        ),
        (
            [CPU, {"name": "gpu:vulkan", "usable_bandwidth_bytes_per_s": fact(18e9)}],
            r"usable_bandwidth_bytes_per_s of gpu:vulkan does not go with the peak bandwidth; got 18,.*; check",
        ),
        (
            [CPU, CARD | {"usable_bandwidth_bytes_per_s": fact(1e9)}],
            r"usable_bandwidth_bytes_per_s of gpu:cuda does not go with .*expected 18,000,000,000 to 900,000,000,000",
        ),
        (
            [CPU | {"fixed_seconds_per_token": fact(2.5)}],
            r"fixed_seconds_per_token: .*got 2.5, expected 0 to 1 seconds; if it is in milliseconds, write 0.0025",
        ),
    ],
)  # fmt: skip
def test_impossible_backends(backends: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profile(backends=backends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_tokens_per_s": None}, r"measured\[0\]: no speed was measured; got none, expected decode_tok"),
        ({"read_bytes": 1 << 30}, r"measured\[0\]: read_bytes exceeds file_bytes; got 1,073,741,824, expected at m"),
        ({"parameters": 1_240_000}, r"file_bytes and parameters do not go together; got 4.52e\+03 bits .*expected 0"),
        ({"file_bytes": 700}, r"measured\[0\].file_bytes: the value is wrong; got 700, expected greater than"),
        ({"file_bytes": 1.5}, r"measured\[0\].file_bytes: the value is wrong; got 1.5, expected a whole number"),
        ({"decode_tokens_per_s": 130.5}, r"a measured run of Q4_0 on cpu reads more than the memory gives; got 9.1"),
        ({"backend": "tpu"}, r"measured\[0\].backend: the value is wrong; got 'tpu', expected 'cpu', 'gpu:cuda'"),
        ({"tokens": 1}, r"measured\[0\]: unknown key 'tokens'; did you mean 'prompt_tokens'"),
    ],
)  # fmt: skip
def test_impossible_runs(changes: dict[str, Any], message: str) -> None:
    run = {key: value for key, value in (RUN | changes).items() if value is not None}
    with pytest.raises(InputError, match=message):
        profile(measured=[run])


def test_what_reads_more_than_the_memory_gives_may_say_that_a_token_reads_less() -> None:
    assert profile(measured=[RUN | {"decode_tokens_per_s": 130.5, "read_bytes": 200_000_000}]).measured


def test_devices_are_listed_by_class(tmp_path: Path) -> None:
    boards = json.loads(printed(tmp_path, "devices", "list", "--class", "board", "--json"))["devices"]
    known = {name for name in device_names() if load_device(name).device_class == "board"}
    assert {one["name"] for one in boards} == known and {one["device_class"] for one in boards} == {"board"}
    text = printed(tmp_path, "devices")
    assert all(name in text for name in device_names())
    wrong = cli(tmp_path, "devices", "list", "--class", "bord")
    assert wrong.returncode == 2
    assert "unknown class of devices 'bord'; did you mean 'board'? Known: board, laptop, phone, tablet." in wrong.stderr


def test_a_file_of_the_users_own_is_shown_like_a_named_device(tmp_path: Path) -> None:
    made = profile(title="My [red]board", measured=[RUN])
    (tmp_path / "my-board.toml").write_text(profile_toml(made), encoding="utf-8")
    shown = json.loads(printed(tmp_path, "devices", "show", "my-board.toml", "--json"))
    assert DeviceProfile.model_validate_json(json.dumps(shown)) == made
    text = printed(tmp_path, "devices", "my-board.toml")
    assert "My [red]board (8 GB) (my-board)" in text
    assert "13.5 tokens/s decoded" in text and "17.1 GB/s" in text and "8 GiB" in text
