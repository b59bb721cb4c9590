"""Whether an artifact fits a device: each limit from both sides, and the sentences."""

from typing import Any

import pytest

from exporter.device.fit import check_fit
from exporter.device.profile import DeviceProfile
from exporter.foundation.errors import ExporterError
from exporter.foundation.quantities import Check, Quantity

GB = 1e9
GIB = 1 << 30


def fact(value: float, basis: str = "published") -> dict[str, Any]:
    return {"value": value, "basis": basis, "source": "data sheet"}


def profile(**changes: Any) -> DeviceProfile:
    """Return an 8 GiB phone on which one app may use 3 GB."""
    facts: dict[str, Any] = {
        "schema_version": 2,
        "name": "my-phone",
        "title": "My phone",
        "device_class": "phone",
        "soc": "SoC",
        "os": "OS",
        "clusters": [{"name": "big", "cores": 4, "clock_ghz": fact(3)}],
        "isa": {"features": ["neon"], "basis": "published", "source": "cpuinfo"},
        "ram_bytes": fact(8 * GIB),
        "app_memory_limit_bytes": fact(3 * GB, "measured"),
        "peak_bandwidth_bytes_per_s": fact(50 * GB),
        "backends": [{"name": "cpu", "usable_bandwidth_bytes_per_s": fact(25 * GB, "estimated")}],
        "preferred": {"target": "gguf", "reason": "kernels"},
        "threads": {"count": 4, "reason": "big cores"},
    }
    return DeviceProfile.model_validate(facts | changes)


def checks(device: DeviceProfile, file_bytes: float, peak_bytes: float) -> dict[str, Check]:
    found = check_fit(device, int(file_bytes), Quantity(value=peak_bytes, unit="bytes", basis="measured"))
    return {check.name: check for check in found}


def test_a_small_artifact_passes_all_three() -> None:
    found = checks(profile(), 1 * GB, 1.5 * GB)
    assert list(found) == ["device.app_memory", "device.ram", "device.file_size"]
    assert {check.status for check in found.values()} == {"passed"}
    assert {check.unit for check in found.values()} == {"bytes"}
    app = found["device.app_memory"]
    assert (app.value, app.limit) == (1.5 * GB, 3 * GB)
    assert app.detail == "peak memory 1.40 GiB (measured) is within what one app may use, 2.79 GiB (measured)"


@pytest.mark.parametrize(("peak", "status"), [(3 * GB, "passed"), (3 * GB + 1, "failed")])
def test_app_memory_at_the_limit(peak: float, status: str) -> None:
    assert checks(profile(), 1 * GB, peak)["device.app_memory"].status == status


def test_app_memory_failure_says_by_how_much() -> None:
    detail = checks(profile(), 1 * GB, 3 * GB + (256 << 20))["device.app_memory"].detail
    assert detail.endswith("exceeds what one app may use, 2.79 GiB (measured), by 256.00 MiB")


def test_entitlement_is_advice_and_not_a_pass() -> None:
    device = profile(app_memory_limit_with_entitlement_bytes=fact(6 * GB))
    fitting, beyond = (checks(device, 1 * GB, peak)["device.app_memory"] for peak in (4 * GB, 6 * GB + 1))
    assert (fitting.status, beyond.status) == ("failed", "failed")
    assert fitting.detail.endswith("it fits an app with the entitlement for more memory, 5.59 GiB (published)")
    assert "entitlement" not in beyond.detail


@pytest.mark.parametrize(
    ("device_class", "ram", "limit"),
    [
        ("phone", 8 * GIB, 8 * GIB - 2 * GB),
        ("laptop", 16 * GIB, 16 * GIB - 2 * GB),
        ("board", 8 * GIB, 8 * GIB - 0.5 * GB),
        ("board", 512 << 20, 256 << 20),
    ],
)
def test_ram_less_the_reserve(device_class: str, ram: int, limit: float) -> None:
    device = profile(device_class=device_class, ram_bytes=fact(ram), app_memory_limit_bytes=fact(ram))
    at_limit, above = (checks(device, 1, peak)["device.ram"] for peak in (limit, limit + 1))
    assert (at_limit.status, above.status) == ("passed", "failed")
    assert at_limit.limit == limit


def test_ram_sentence_states_the_reserve_and_each_basis() -> None:
    detail = checks(profile(), 1 * GB, 7 * GB)["device.ram"].detail
    assert detail == (
        "peak memory 6.52 GiB (measured) exceeds 6.14 GiB: RAM of 8.00 GiB (published) "
        "less 1.86 GiB for the system (estimated), by 391.07 MiB"
    )


@pytest.mark.parametrize(("size", "status"), [(3 * GB - 1, "passed"), (3 * GB, "failed")])
def test_file_must_be_smaller_than_the_limit(size: float, status: str) -> None:
    assert checks(profile(), size, 1 * GB)["device.file_size"].status == status


def test_file_size_sentence_names_the_storage() -> None:
    device = profile(storage_read_bytes_per_s=fact(90e6, "estimated"))
    assert "storage" not in checks(device, 1 * GB, 1 * GB)["device.file_size"].detail
    assert "storage" not in checks(profile(), 4 * GB, 1 * GB)["device.file_size"].detail
    detail = checks(device, 4 * GB, 1 * GB)["device.file_size"].detail
    assert detail.startswith("a model of 3.73 GiB (measured) exceeds what one app may use, 2.79 GiB (measured), by ")
    assert detail.endswith(
        "must stay in memory to be fast, or each token reads the rest from storage at 90 MB/s (estimated)"
    )


def test_predicted_file_size_says_so() -> None:
    peak = Quantity(value=1 * GB, unit="bytes", basis="estimated")
    detail = check_fit(profile(), 500, peak, file_basis="estimated")[2].detail
    assert detail == "a model of 500 bytes (estimated) is within what one app may use, 2.79 GiB (measured)"


@pytest.mark.parametrize(
    ("file_bytes", "value", "unit"), [(1, 1.0, "GiB"), (1, 0.0, "bytes"), (1, -1.0, "bytes"), (0, 1.0, "bytes")]
)
def test_sizes_that_are_none_are_refused(file_bytes: int, value: float, unit: str) -> None:
    peak = Quantity(value=value, unit=unit, basis="measured")
    with pytest.raises(
        ExporterError, match=r"my-phone: the sizes of an artifact are not positive.*expected bytes above"
    ):
        check_fit(profile(), file_bytes, peak)
