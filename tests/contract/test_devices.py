"""What every device profile in the registry promises."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel

from exporter.device.backend import InstructionSet, Measured
from exporter.device.fit import check_fit
from exporter.device.profile import PACKAGE, device_names, load_device
from exporter.device.profile_writer import profile_toml
from exporter.device.provenance import Fact, Sizes
from exporter.foundation.quantities import Quantity
from exporter.targets.artifact import target_names

Sourced = Fact | Sizes | InstructionSet | Measured
every_device = pytest.mark.parametrize("name", device_names())


def sourced(node: object) -> Iterator[Sourced]:
    """Yield every sourced statement of a profile."""
    if isinstance(node, Sourced):
        yield node
    elif isinstance(node, BaseModel):
        for key in type(node).model_fields:
            yield from sourced(getattr(node, key))
    elif isinstance(node, tuple):
        for item in node:
            yield from sourced(item)


def test_the_registry_covers_the_classes() -> None:
    profiles = [load_device(name) for name in device_names()]
    assert len(profiles) >= 34
    assert {profile.device_class for profile in profiles} == {"phone", "tablet", "laptop", "board"}
    assert {profile.preferred.target for profile in profiles} <= set(target_names())


def test_the_folder_holds_profiles_only() -> None:
    held = {entry.name for entry in files(PACKAGE).iterdir()} - {"__init__.py", "__pycache__"}
    assert held == {f"{name}.toml" for name in device_names()}


@every_device
def test_name_is_file_name_and_fit_for_a_command_line(name: str) -> None:
    assert load_device(name).name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)


@every_device
def test_it_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    profile = load_device(name)
    file = tmp_path / f"{name}.toml"
    file.write_text(profile_toml(profile), encoding="utf-8")
    assert load_device(str(file)) == profile


@every_device
def test_every_number_says_where_it_is_from(name: str) -> None:
    statements = list(sourced(load_device(name)))
    assert len(statements) >= 6
    for statement in statements:
        assert statement.source.strip()
        # `measured` means on this host, and `emulated` under its limits: a shipped profile can be neither.
        assert statement.basis in {"published", "estimated"}
        if any(word in statement.source for word in ("recalled", "carried over", "planning", "inferred", "assumed")):
            assert statement.basis == "estimated"


@every_device
def test_backends_say_what_reaches_the_processors(name: str) -> None:
    profile = load_device(name)
    kinds = {backend.name.partition(":")[0] for backend in profile.backends}
    assert "cpu" in kinds and kinds <= {"cpu", "gpu", "npu"}
    assert profile.device_class == "board" or "gpu" in kinds
    assert all(backend.processor for backend in profile.backends if backend.name != "cpu")
    for run in profile.measured:
        profile.backend(run.backend)


@every_device
def test_a_size_that_is_sold_is_installed(name: str) -> None:
    profile = load_device(name)
    sold = profile.ram_options_bytes
    assert sold is None or profile.ram_bytes.value in sold.values
    assert (profile.ram_bytes.value / (1 << 30)).is_integer()


@every_device
def test_numbers_are_in_proportion(name: str) -> None:
    profile = load_device(name)
    assert profile.app_memory_limit_bytes.value < profile.ram_bytes.value
    share = profile.cpu_bandwidth.value / profile.peak_bandwidth_bytes_per_s.value
    assert 0.2 <= share <= 0.85
    clocks = [cluster.clock_ghz.value for cluster in profile.clusters]
    assert clocks == sorted(clocks, reverse=True)


@every_device
def test_threads_use_whole_clusters_of_the_fastest_cores(name: str) -> None:
    profile = load_device(name)
    sizes = [cluster.cores for cluster in profile.clusters]
    whole = {sum(sizes[: count + 1]) for count in range(len(sizes))}
    assert profile.threads.count in whole or len(sizes) == 1


@every_device
def test_instructions_name_the_base_of_their_architecture(name: str) -> None:
    features = load_device(name).isa.features
    assert ("neon" in features) != ("avx2" in features)


@every_device
def test_a_small_model_fits_and_a_huge_one_does_not(name: str) -> None:
    profile = load_device(name)
    small = check_fit(profile, 105_454_112, Quantity(value=2.5e8, unit="bytes", basis="measured"))
    huge = check_fit(profile, 2 << 40, Quantity(value=2.0 * (1 << 40), unit="bytes", basis="measured"))
    assert {check.status for check in small} == {"passed"}
    assert {check.status for check in huge} == {"failed"}
