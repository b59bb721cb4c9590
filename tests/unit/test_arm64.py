"""Emulated Arm cores without an emulator: which core stands in, what is chosen, what is refused and in which words."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf.quants import dequantize

from exporter.compress.compression import Compression
from exporter.device.profile import device_names, load_device
from exporter.emulate.arm64 import setup
from exporter.emulate.arm64.core import CORES, CORTEX_A72, CORTEX_A76, WITH_I8MM, lacked, stand_in
from exporter.emulate.arm64.installation import Installation
from exporter.emulate.arm64.logits import read_logits
from exporter.emulate.arm64.machine import EmulatedMachine
from exporter.foundation import building, cache
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.errors import MissingDependencyError, RequestError, RuntimeCrashError
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model
from exporter.prove.arm64 import NAMES, Loss, check_agreement, check_rounding, choose, loss, settle
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.emulated import emulation_needs
from exporter.targets.gguf.emulated import EmulatedGguf, write_decoded
from exporter.targets.onnx.rounding import FLOAT32, KLEIDIAI, WITHOUT_KLEIDIAI
from tests.models import tiny_model

WAYS = {"rows": KLEIDIAI, "blocks": WITHOUT_KLEIDIAI, "float32": FLOAT32}


def test_no_stand_in_has_an_instruction_that_the_device_lacks() -> None:
    for name in device_names():
        device = load_device(name)
        core = stand_in(device)
        if core is not None:
            assert core.features <= set(device.isa.features)
            assert not any(core.features < other.features <= set(device.isa.features) for other in CORES)
    found = {name: stand_in(load_device(name)) for name in device_names()}
    assert found["raspberry-pi-4"] is CORTEX_A72
    assert found["raspberry-pi-5"] is CORTEX_A76
    assert found["galaxy-s24-ultra"] is WITH_I8MM
    assert found["core-ultra-200v"] is None
    assert lacked(WITH_I8MM, load_device("pixel-9")) == ("sve2",)


def test_cpuinfo_has_a_paragraph_for_each_core() -> None:
    text = CORTEX_A76.cpuinfo(2)
    assert text.count("CPU part\t: 0xd0b\n") == text.count("\n\n") == 2
    assert " asimddp" in text
    assert " asimddp" not in CORTEX_A72.cpuinfo(1)


def losses(*kl: float) -> dict[str, Loss]:
    return {name: Loss(value, 0.001, 0.9, 256) for name, value in zip(WAYS, kl, strict=False)}


@pytest.mark.parametrize(
    ("kl", "chosen"), [((0.01, 0.009, 0.0), "rows"), ((0.05, 0.009, 0.0), "blocks"), ((0.05, 0.03, 0.0), "float32")]
)
def test_the_quickest_way_within_the_limit_is_chosen(kl: tuple[float, ...], chosen: str) -> None:
    found = losses(*kl)
    assert choose(found, 0.02, WAYS, WITHOUT_KLEIDIAI) == chosen
    check = check_rounding(found, chosen, 0.02, WAYS[chosen].reason, CORTEX_A76)
    assert (check.status, check.value, check.limit) == ("passed", found[chosen].kl_mean, 0.02)
    assert f"rows {kl[0]:.2g} ± 0.001 nats" in check.detail
    assert WAYS[chosen].reason in check.detail


def test_what_keeps_within_no_limit_stays_and_fails() -> None:
    found = losses(0.05, 0.03)
    ways = {name: WAYS[name] for name in found}
    chosen = choose(found, 0.02, ways, WITHOUT_KLEIDIAI)
    check = check_rounding(found, chosen, 0.02, WAYS[chosen].reason, CORTEX_A76)
    assert (chosen, check.status) == ("blocks", "failed")
    assert "float32 activations have no quick kernels for these codes" in check.detail


def test_loss_is_the_divergence_by_its_definition() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 40, 7)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (first, second))
    expected = [sum(a * np.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    found = loss(first, second)
    assert found.kl_mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.kl_error == pytest.approx(np.std(expected) / 40**0.5, rel=1e-9)
    assert found.top1_agreement == (first.argmax(1) == second.argmax(1)).mean()
    assert loss(first, first).kl_mean == 0


def test_float_logits_must_agree_closely() -> None:
    here = np.random.default_rng(0).standard_normal((16, 50)).astype(np.float32)
    near, far = here + np.float32(1e-4), here.copy()
    far[3, 4] += 0.002
    assert check_agreement(here, near, CORTEX_A72).status == "passed"
    assert check_agreement(here, far, CORTEX_A72).status == "failed"
    assert "at most 2.0e-03" in check_agreement(here, far, CORTEX_A72).detail
    assert check_agreement(here, here[:, :-1], CORTEX_A72).status == "failed"


def test_logits_from_outside_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "0.npy"
    with pytest.raises(RuntimeCrashError, match=r"0.npy: the emulated program left no logits; got 0 bytes"):
        read_logits(path, 2)
    good = np.ones((2, 3), np.float32)
    np.save(path, good)
    np.testing.assert_array_equal(read_logits(path, 2), good)
    for bad, got in {
        "objects": (np.array([[{}], [{}]], object), "Object arrays cannot be loaded"),
        "doubles": (good.astype(np.float64), r"float64 \[2, 3\]"),
        "rows": (good[:1], r"float32 \[1, 3\]"),
        "nan": (np.full((2, 3), np.nan, np.float32), "not finite"),
    }.values():
        np.save(path, bad, allow_pickle=True)
        with pytest.raises(RuntimeCrashError, match=f"left no logits; got .*{got}"):
            read_logits(path, 2)
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(RuntimeCrashError, match="got 17,179,869,184 bytes, expected finite float32"):
        read_logits(path, 2)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder that programs are looked for in."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, text: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)


def test_without_qemu_nothing_is_run_and_the_package_is_named(programs: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"emulation of ARM64 is not installed; .* qemu-user-static"):
        EmulatedMachine(CORTEX_A76, programs, programs).run(["/bin/true"], 1)
    with pytest.raises(MissingDependencyError, match="qemu-user-static"):
        setup.install(emulation_needs())
    artifact = Artifact("onnx", programs, ())
    found = settle(artifact, load_device("raspberry-pi-5"), np.zeros((1, 300), np.int64))
    assert [(check.name, check.status) for check in found.checks] == [(name, "not run") for name in NAMES]
    assert "qemu-user-static" in found.checks[0].detail


def test_without_the_system_the_command_is_named(programs: Path) -> None:
    program(programs, "qemu-aarch64-static")
    with pytest.raises(MissingDependencyError, match="not set up; run edge-exporter emulate setup"):
        Installation(programs).machine(CORTEX_A76)
    found = settle(Artifact("onnx", programs, ()), load_device("raspberry-pi-5"), np.zeros((1, 300), np.int64))
    assert {check.status for check in found.checks} == {"not run"}


def test_without_a_compiler_gguf_files_are_not_run_and_the_packages_are_named(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    program(programs, "qemu-aarch64-static")
    assert setup.missing_compilers() == ["cmake", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"]
    found = setup.installation(emulation_needs())
    for place in (found.root, found.packages):
        kept_folder(place, lambda folder: None)
    assert setup.install(emulation_needs()) == found
    assert not found.programs.exists()
    checks = settle(Artifact("gguf", programs, ()), load_device("raspberry-pi-5"), np.zeros((1, 300), np.int64)).checks
    assert {check.status for check in checks} == {"not run"}
    assert "apt-get install g++-aarch64-linux-gnu cmake; run edge-exporter emulate setup" in checks[0].detail


def tiny_gguf(folder: Path) -> Artifact:
    tiny_model(folder / "source", hidden=256)
    target = load_target("gguf")
    with open_model(str(folder / "source")) as model:
        decisions = target.decide(model, "Q4_K_M", "rtn")
        return lower(target, Compression(model, decisions), "Q4_K_M", folder).artifact


def test_without_space_for_the_decoded_weights_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_gguf(tmp_path)
    monkeypatch.setattr(EmulatedGguf, "require", lambda *_: None)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    found = settle(artifact, load_device("raspberry-pi-5"), np.full((1, 300), 5, np.int64))
    assert {check.status for check in found.checks} == {"not run"}
    assert "not enough free disk space; got 1,000 bytes" in found.checks[0].detail
    assert "free some space for the weights in float32" in found.checks[0].detail
    assert not list(tmp_path.glob(".setting-*"))


def test_a_decoded_file_says_the_same_in_float32(tmp_path: Path) -> None:
    artifact = tiny_gguf(tmp_path)
    write_decoded(artifact.weights[0], tmp_path / "decoded.gguf")
    before, after = (open_gguf(path) for path in (artifact.weights[0], tmp_path / "decoded.gguf"))
    kept = {name for name in before.fields if not name.startswith("GGUF.")} - {"general.file_type"}
    assert {name: after.fields[name].contents() for name in kept} == {
        name: before.fields[name].contents() for name in kept
    }
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    assert {tensor.tensor_type.name for tensor in before.tensors} > {"F32", "Q4_K"}
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert other.tensor_type.name == "F32"
        np.testing.assert_array_equal(other.data, dequantize(one.data, one.tensor_type))


def test_other_targets_and_other_devices_are_left_alone(programs: Path) -> None:
    tokens = np.zeros((1, 300), np.int64)
    assert settle(Artifact("onnx", programs, ()), load_device("core-ultra-200v"), tokens).checks == ()
    found = settle(Artifact("onnx-qdq", programs, ()), load_device("raspberry-pi-5"), tokens)
    assert {check.detail for check in found.checks} == {"the target onnx-qdq is not run on emulated cores"}


def test_set_up_names_what_is_missing(programs: Path) -> None:
    program(programs, "qemu-aarch64-static")
    with pytest.raises(MissingDependencyError, match="apt-get is not installed; set up on Debian"):
        setup.install(emulation_needs())
    program(programs, "apt-get")
    with pytest.raises(MissingDependencyError, match="dpkg-deb is not installed"):
        setup.install(emulation_needs())
    program(programs, "dpkg-deb")
    with pytest.raises(RequestError, match="apt has no list of Debian's packages here; run apt-get update"):
        setup.install(emulation_needs())
    program(programs, "apt-get", 'if [ "$1" = indextargets ]; then echo deb x y z; else echo no route >&2; exit 9; fi')
    with pytest.raises(RequestError, match="apt-get: a package cannot be installed; got no route; check the network"):
        setup.install(emulation_needs())
    left = [path.name for path in setup.installation(emulation_needs()).folder.iterdir()]
    assert left == ["apt"], "nothing half-made stays, and apt goes on with what it has"


def test_a_system_that_does_not_run_is_not_kept(programs: Path) -> None:
    program(programs, "qemu-aarch64-static", "echo Invalid ELF image for this architecture >&2; exit 255")
    program(programs, "dpkg-deb")
    program(programs, "apt-get", 'if [ "$1" = indextargets ]; then echo deb x y z; fi')
    with pytest.raises(RuntimeCrashError, match="Invalid ELF image"):
        setup.install(emulation_needs())
    assert not setup.installation(emulation_needs()).root.exists()


def test_set_up_waits_no_longer_than_its_limit(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "qemu-aarch64-static")
    program(programs, "dpkg-deb")
    program(programs, "apt-get", "exec /bin/sleep 60")
    monkeypatch.setattr(building, "TIMEOUT_S", 0.2)
    with pytest.raises(RequestError, match=r"apt-get: no end of an installation; got 0.2 s; check the network"):
        setup.install(emulation_needs())


def test_the_versions_are_those_of_this_machine() -> None:
    pins = Path(__file__).parents[2].joinpath(".ci/constraints.txt").read_text("utf-8").splitlines()
    needs = emulation_needs()
    assert needs.program is not None
    pinned = {**setup.WHEELS, **needs.wheels, **dict([needs.program.source])}
    assert set(pinned) <= set(pins)
    assert all(len(digest) == 64 for digests in pinned.values() for digest in digests)
    assert os.environ["EDGE_EXPORTER_CACHE"] in str(setup.installation(emulation_needs()).folder)
