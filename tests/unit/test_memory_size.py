"""The memory that a device is sold with: one size is chosen, and its limits follow."""

import json
from pathlib import Path

import pytest

from exporter.device.memory_size import device_with, ram_bytes
from exporter.device.profile import DeviceProfile, device_names, load_device
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from tests.commands import cli
from tests.models import tiny_model

GIB = 1 << 30


@pytest.mark.parametrize("text", ["8GB", "8 GB", "8gb", "8GiB", "8G", " 8GB ", "8.0GB"])
def test_a_size_is_written_as_shops_do(text: str) -> None:
    assert ram_bytes(text) == 8 * GIB


@pytest.mark.parametrize("text", ["", "8", "GB", "8TB", "8 GBs", "-8GB", "1e9GB", "8,5GB", "8GB\n9GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"--ram: this is no size of memory; .*expected a size such as 8GB"):
        ram_bytes(text)


@pytest.mark.parametrize("name", device_names())
def test_every_size_that_is_sold_makes_a_possible_profile(name: str) -> None:
    profile = load_device(name)
    sold = profile.ram_options_bytes
    sizes = (profile.ram_bytes.value,) if sold is None else sold.values
    made = [device_with(name, int(size)) for size in sizes]
    for size, one in zip(sizes, made, strict=True):
        assert DeviceProfile.model_validate(one.model_dump()) == one
        assert one.ram_bytes.value == size and f"{size / GIB:g} GB" in one.full_title
        assert (one == profile) == (size == profile.ram_bytes.value)
    limits = [one.app_memory_limit_bytes.value for one in made]
    assert limits == sorted(limits) and len(set(limits)) == len(limits)


def test_boards_keep_what_the_system_takes_and_phones_the_share() -> None:
    board, phone = device_with("raspberry-pi-5", 2 * GIB), device_with("oneplus-12", 16 * GIB)
    assert board.app_memory_limit_bytes.value == 2 * GIB - 5e8
    assert phone.app_memory_limit_bytes.value == 8 * GIB
    for one in (board, phone):
        assert one.app_memory_limit_bytes.basis == "estimated" and "as with" in one.app_memory_limit_bytes.source


def test_a_size_that_is_not_sold_is_refused_with_those_that_are() -> None:
    with pytest.raises(RequestError, match=r"raspberry-pi-5: .*got 3 GB, expected one of 1, 2, 4, 8, 16 GB; name one"):
        device_with("raspberry-pi-5", 3 * GIB)
    with pytest.raises(RequestError, match=r"iphone-16-pro: .*got 16 GB, expected one of 8 GB"):
        device_with("iphone-16-pro", 16 * GIB)


def test_the_most_common_size_is_taken_and_named(tmp_path: Path) -> None:
    assert load_device("raspberry-pi-5").full_title == "Raspberry Pi 5 (8 GB)"
    assert load_device("macbook-air-m1").full_title == "Apple MacBook Air (M1, 8 GB)"
    folder = str(tiny_model(tmp_path / "model"))
    with open_model(folder) as model:
        usual = resolve(Job(folder, "raspberry-pi-5", context=64), model).device
        small = resolve(Job(folder, "raspberry-pi-5", context=64, ram_bytes=GIB), model).device
    assert (usual.ram_bytes.value, small.ram_bytes.value) == (8 * GIB, GIB)
    planned = json.loads(cli(tmp_path, "plan", folder, "-d", "raspberry-pi-5", "--ram", "1GB", "--json").stdout)
    assert planned["device_title"] == "Raspberry Pi 5 (1 GB)"
    assert {check["limit"] for check in planned["checks"] if check["name"] == "device.ram"} == {GIB - 5e8}
