"""Reading a device profile: names, paths, and every way in which a file can be wrong."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from exporter.device.profile import DeviceProfile, device_names, load_device
from exporter.foundation.config_files import MAX_FILE_BYTES
from exporter.foundation.errors import InputError, RequestError

GOOD = """
schema_version = 2
name = "my-board"
title = "My board"
device_class = "board"
soc = "BCM2712"
os = "Linux"
clusters = [
    { name = "big", cores = 4, clock_ghz = { value = 2.4, basis = "published", source = "data sheet" } },
    { name = "little", cores = 2, clock_ghz = { value = 1, basis = "estimated", source = "recalled" } },
]
isa = { features = ["neon", "dotprod"], basis = "published", source = "cpuinfo" }
ram_bytes = { value = 4_294_967_296, basis = "published", source = "data sheet" }
app_memory_limit_bytes = { value = 3e9, basis = "measured", source = "free" }
peak_bandwidth_bytes_per_s = { value = 17.1e9, basis = "published", source = "data sheet" }
backends = [
    { name = "cpu", usable_bandwidth_bytes_per_s = { value = 10e9, basis = "measured", source = "llama-bench" } },
]
preferred = { target = "gguf", reason = "kernels for these cores" }
threads = { count = 4, reason = "big cores" }
"""


def load(folder: Path, text: str | bytes, name: str = "my-board.toml") -> DeviceProfile:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_device(str(file))


def replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_own_profile_is_read(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD)
    assert (profile.name, profile.cores, profile.threads.count) == ("my-board", 6, 4)
    assert profile.isa.features == ("neon", "dotprod")
    assert profile.ram_bytes.value == 4 << 30
    assert profile.cpu_bandwidth.basis == "measured"
    assert profile.app_memory_limit_with_entitlement_bytes is None
    assert profile.storage_read_bytes_per_s is None


def test_profile_survives_json_and_is_frozen(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD)
    assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile
    with pytest.raises(ValueError, match="frozen"):
        profile.name = "other"


@pytest.mark.parametrize(("file", "given"), [("my-board.toml", "my-board.toml"), ("my-board", "./my-board")])
def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, given: str) -> None:
    (tmp_path / file).write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_device(given).name == "my-board"


def test_named_device() -> None:
    assert load_device("raspberry-pi-5").soc == "BCM2712"
    assert device_names() == sorted(device_names())


@pytest.mark.parametrize("wrong", ["rasberry-pi-5", "Raspberry-Pi-5"])
def test_unknown_device_names_the_nearest(wrong: str) -> None:
    with pytest.raises(RequestError, match=f"unknown device '{wrong}'; did you mean 'raspberry-pi-5'.*galaxy"):
        load_device(wrong)


@pytest.mark.parametrize("wrong", ["", "..", "__init__", "raspberry_pi_5", "x" * 5000, "\x1b[31m"])
def test_odd_device_names_are_unknown_and_shown_short(wrong: str) -> None:
    with pytest.raises(RequestError, match="unknown device") as caught:
        load_device(wrong)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("where", ["missing.toml", "folder.toml"])
def test_path_without_a_file(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RequestError, match=rf"{where}: there is no such file; give the path of a device profile\."):
        load_device(str(tmp_path / where))


def test_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the device profile cannot be read; got File name too long"):
        load_device(str(tmp_path / ("x" * 300 + ".toml")))


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(RequestError, match="there is no such file"):
        load_device(str(tmp_path / "pipe.toml"))


@pytest.mark.parametrize(
    "text",
    ["name =", b"\xff\xfe", "a = " + "[" * 100_000, "a = " + "9" * 5000, GOOD + 'name = "again"'],
    ids=["syntax", "not UTF-8", "deep", "long integer", "key twice"],
)
def test_broken_toml(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(
        InputError, match=r"my-board.toml: the device profile is not TOML; got .*, expected TOML in UTF-8"
    ):
        load(tmp_path, text)


def test_size_is_bounded(tmp_path: Path) -> None:
    padding = MAX_FILE_BYTES - len(GOOD) - 1
    assert load(tmp_path, GOOD + "#" * padding + "\n").name == "my-board"
    with pytest.raises(InputError, match="the device profile is too large; expected at most 262144 bytes"):
        load(tmp_path, GOOD + "#" * (padding + 1) + "\n")


def test_name_is_the_file_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name of its file; got 'my-board', expected 'other'; rename one of the two"):
        load(tmp_path, GOOD, "other.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ram_bytes", "ram_byte", r"my-board.toml: unknown key 'ram_byte'; did you mean 'ram_bytes'\?"),
        ("cores = 4", "core = 4", r"my-board.toml: clusters\[0\]: unknown key 'core'; did you mean 'cores'\?"),
        ("value = 2.4", "valeu = 2.4", r"clusters\[0\].clock_ghz: unknown key 'valeu'; did you mean 'value'\?"),
        ("value = 3e9,", "value = 3e9, unit = 1,", r"app_memory_limit_bytes: unknown key 'unit'; known: basis, source"),
        ('os = "Linux"', "", r"my-board.toml: os: the key is missing; add it"),
        ("value = 3e9,", "", r"app_memory_limit_bytes.value: the key is missing"),
        (
            "value = 3e9",
            'value = "3 GB"',
            r"app_memory_limit_bytes.value: the value is wrong; got '3 GB', expected a number",
        ),
        ("value = 3e9", "value = true", r"app_memory_limit_bytes.value: .*got True, expected a number"),
        ("value = 3e9", "value = nan", r"app_memory_limit_bytes.value: .*got nan, expected a finite number"),
        ("cores = 4", "cores = 4.5", r"clusters\[0\].cores: the value is wrong; got 4.5, expected a whole number"),
        ("cores = 4", "cores = 0", r"clusters\[0\].cores: .*got 0, expected greater than or equal to 1"),
        ("cores = 4", "cores = 257", r"clusters\[0\].cores: .*got 257, expected less than or equal to 256"),
        ('soc = "BCM2712"', "soc = 2712", r"my-board.toml: soc: the value is wrong; got 2712, expected text"),
        ('soc = "BCM2712"', "soc = 2024-01-01", r"soc: the value is wrong; got datetime.date.*, expected text"),
        ("threads = {", "threads = 4 #", r"threads: the value is wrong; got 4, expected a table"),
        ('["neon", "dotprod"]', '"neon"', r"isa.features: the value is wrong; got 'neon', expected a list"),
        (
            '["neon", "dotprod"]',
            '["neon", "dotprd"]',
            r"isa.features\[1\]: the value is wrong; got 'dotprd', expected '",
        ),
        (
            'device_class = "board"',
            'device_class = "watch"',
            r"device_class: .*got 'watch', expected 'phone', 'tablet'",
        ),
        (
            'basis = "estimated"',
            'basis = "guessed"',
            r"clusters\[1\].clock_ghz.basis: .*expected 'measured', 'emulated'",
        ),
        (
            "schema_version = 2",
            "schema_version = 1",
            r"my-board.toml: the profile is of an earlier schema; got schema_version 1, expected 2; set.*move",
        ),
        (
            "schema_version = 2",
            "schema_version = 3",
            r"the profile is of a later schema; got schema_version 3, expected 2; update edge-exporter\.",
        ),
        ('target = "gguf"', 'target = "a target"', r"preferred.target: .*got 'a target'"),
    ],
)
def test_wrong_keys_and_types(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, replaced(old, new))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "value = 4_294_967_296",
            "value = 67_108_863",
            r"ram_bytes: the number is impossible; got 67,108,863, expected 64 MiB",
        ),
        ("value = 4_294_967_296", "value = 2e12", r"ram_bytes: .* expected 64 MiB to 1 TiB, in bytes"),
        ("value = 3e9", "value = 0", r"app_memory_limit_bytes: .*got 0, expected 32 MiB to 1 TiB, in bytes\."),
        (
            "value = 3e9",
            "value = 5e9",
            r"app_memory_limit_bytes exceeds ram_bytes; got 5,000,000,000, expected at most 4,294",
        ),
        (
            "value = 10e9",
            "value = 20e9",
            r"usable_bandwidth_bytes_per_s of cpu does not go with the peak bandwidth; got 20,000,000,000, expected",
        ),
        (
            "value = 17.1e9",
            "value = 17.1",
            r"peak_bandwidth_bytes_per_s: .*got 17.1, expected 0.5e9 to 5e12 bytes/s; if",
        ),
        ("value = 10e9", "value = 10e12", r"backends\[0\].usable_bandwidth_bytes_per_s: the number is impossible"),
        ("value = 2.4", "value = 2400", r"clusters\[0\].clock_ghz: .*got 2,400, expected 0.1 to 7 GHz"),
        ("value = 2.4", "value = -2.4", r"clusters\[0\].clock_ghz: .*got -2.4, expected 0.1 to 7 GHz"),
        ("count = 4", "count = 7", r"threads.count exceeds the cores; got 7, expected at most 6"),
        ("cores = 4", "cores = 255", r"the clusters have too many cores; got 257, expected at most 256"),
        ('"neon", "dotprod"', '"neon", "avx2"', r"isa: no core has both Arm and x86 features; got neon, avx2"),
        (
            '"neon", "dotprod"',
            '"neon", "neon"',
            r"isa: a feature is listed twice; got neon, neon, expected each feature once",
        ),
        (
            'source = "free"',
            'source = " "',
            r"app_memory_limit_bytes.source: the text cannot be shown; got ' ', expected 1 to",
        ),
        (
            '"My board"',
            r'"\u001b[31mred"',
            r"title: the text cannot be shown; got '\\x1b\[31mred', expected 1 to 1000 printable",
        ),
        ('"My board"', '"' + "x" * 1001 + '"', r"title: the text cannot be shown; got 'x+\.\.\.x+', expected"),
    ],
)
def test_impossible_numbers_and_texts(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, replaced(old, new))


@pytest.mark.parametrize(
    ("entitled", "message"),
    [
        ("2e9", "app_memory_limit_bytes exceeds app_memory_limit_with_entitlement_bytes"),
        ("5e9", "app_memory_limit_with_entitlement_bytes exceeds ram_bytes"),
    ],
)
def test_entitlement_lies_between_limit_and_ram(tmp_path: Path, entitled: str, message: str) -> None:
    entry = 'app_memory_limit_with_entitlement_bytes = {{ value = {}, basis = "measured", source = "an app" }}'
    assert load(tmp_path, GOOD + entry.format("3.5e9")).app_memory_limit_with_entitlement_bytes is not None
    with pytest.raises(InputError, match=message):
        load(tmp_path, GOOD + entry.format(entitled))


def test_storage_speed_is_bounded(tmp_path: Path) -> None:
    entry = 'storage_read_bytes_per_s = {{ value = {}, basis = "published", source = "data sheet" }}'
    assert load(tmp_path, GOOD + entry.format("90e6")).storage_read_bytes_per_s is not None
    with pytest.raises(
        InputError,
        match=r"storage_read_bytes_per_s: .*got 90, expected 1e7 to 1e11 bytes/s; if it is in MB/s, write 90_000_000\.",
    ):
        load(tmp_path, GOOD + entry.format("90"))


def test_misspelt_key_in_an_optional_table_is_explained(tmp_path: Path) -> None:
    entry = 'storage_read_bytes_per_s = { value = 9e7, basis = "published", sorce = "data sheet" }'
    with pytest.raises(InputError, match=r"storage_read_bytes_per_s: unknown key 'sorce'; did you mean 'source'\?"):
        load(tmp_path, GOOD + entry)


def test_hostile_key_is_shown_escaped_and_short(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key '\\x1b\[31m") as caught:
        load(tmp_path, GOOD + '"\\u001b[31m' + "x" * 10_000 + '" = 1')
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_every_leaf_replaced_by_nonsense_is_an_input_error(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD).model_dump(mode="json", exclude_none=True)
    for steps in leaves(profile):
        broken = copy.deepcopy(profile)
        table = broken
        for step in steps[:-1]:
            table = table[step]
        table[steps[-1]] = {"nonsense": [1, 2]}
        with pytest.raises(InputError):
            load(tmp_path, "\n".join(f"{key} = {toml(value)}" for key, value in broken.items()))


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    if isinstance(node, list):
        return [leaf for index, value in enumerate(node) for leaf in leaves(value, (*path, index))]
    return [path]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_a_schema_version_of_any_length_is_told_in_short(tmp_path: Path) -> None:
    for number, bits in (("9" * 4000, 13_288), ("0x" + "f" * 10_000, 40_000)):
        with pytest.raises(
            InputError, match=f"of a later schema; got schema_version a number of {bits} bits"
        ) as refused:
            load(tmp_path, GOOD.replace("schema_version = 2", f"schema_version = {number}"))
        assert len(str(refused.value)) < 1000
