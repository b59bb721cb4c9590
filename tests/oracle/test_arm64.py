"""Real ARM64 instructions under QEMU: what a core has not ends the program, and kernels compute what they should."""

import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from exporter.compress.compression import Compression
from exporter.device.profile import load_device
from exporter.emulate.arm64.core import CORES, CORTEX_A72, CORTEX_A76, Core
from exporter.emulate.arm64.installation import Installation
from exporter.emulate.arm64.machine import QEMU, EmulatedMachine, IllegalInstructionError
from exporter.emulate.arm64.setup import installation
from exporter.foundation.cache_entries import folder_is_whole
from exporter.foundation.errors import RuntimeCrashError
from exporter.model.sources import open_model
from exporter.prove import arm64
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.emulated import emulation_needs
from exporter.targets.onnx.emulated import EMULATED
from exporter.targets.onnx.rounding import KLEIDIAI, WITHOUT_KLEIDIAI
from tests.models import tiny_model

# Emulated cores take their time where this machine is busy.
pytestmark = pytest.mark.timeout(1200)
# Read before the tests get a cache of their own.
INSTALLED = installation(emulation_needs())
needs_qemu = pytest.mark.skipif(
    not any(map(shutil.which, QEMU)), reason="no QEMU; install it: apt-get install qemu-user-static"
)
needs_system = pytest.mark.skipif(
    not (folder_is_whole(INSTALLED.root) and folder_is_whole(INSTALLED.packages)),
    reason="no ARM64 system; install it: apt-get install qemu-user-static && edge-exporter emulate setup",
)
needs_programs = pytest.mark.skipif(
    not INSTALLED.programs.is_dir(),
    reason="no llama.cpp for ARM64; install it: "
    "apt-get install qemu-user-static g++-aarch64-linux-gnu cmake && edge-exporter emulate setup",
)
# AArch64 machine code, from the Arm Decoder Reference Manual (DDI 0487): SDOT (vector) is of FEAT_DotProd.
SDOT = 0x4E82_9420  # sdot v0.4s, v1.16b, v2.16b
EXIT = (0xD280_0BA8, 0xD280_0000, 0xD400_0001)  # mov x8, 93; mov x0, 0; svc 0
FOREVER = 0x1400_0000  # b .
ADDRESS = 0x40_0000
LOUD = 12.0


def executable(path: Path, *instructions: int) -> Path:
    """Write a static ELF executable of some instructions."""
    code = struct.pack(f"<{len(instructions)}I", *instructions)
    size = 64 + 56 + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 183, 1, ADDRESS + 120, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    path.write_bytes(header + struct.pack("<IIQQQQQQ", 1, 5, 0, ADDRESS, ADDRESS, size, size, 0x1000) + code)
    path.chmod(0o755)
    return path


def bare(core: Core, folder: Path) -> EmulatedMachine:
    return EmulatedMachine(core, folder, folder)


@needs_qemu
def test_a_program_for_newer_cores_is_caught(tmp_path: Path) -> None:
    program = executable(tmp_path / "dot", SDOT, *EXIT)
    assert bare(CORTEX_A76, tmp_path).run([program], 60) == ""
    with pytest.raises(
        IllegalInstructionError, match=r"Cortex-A72 met an instruction that it does not have \(SIGILL\)"
    ):
        bare(CORTEX_A72, tmp_path).run([program], 60)
    assert bare(CORTEX_A72, tmp_path).run([executable(tmp_path / "plain", *EXIT)], 60) == ""
    assert not list(tmp_path.glob("*.core"))


@needs_qemu
def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    program = executable(tmp_path / "forever", FOREVER)
    with pytest.raises(RuntimeCrashError, match="died on the emulated Cortex-A72; got no end after 1 s"):
        bare(CORTEX_A72, tmp_path).run([program], 1)


@needs_qemu
def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeCrashError, match="died on the emulated Cortex-A72; got exit code 1, expected its answer"
    ):
        bare(CORTEX_A72, tmp_path).run([tmp_path / "missing"], 60)
    zero_page = executable(tmp_path / "crash", 0xD280_0000, 0xF900_0000)  # mov x0, 0; str x0, [x0]
    with pytest.raises(RuntimeCrashError, match="got signal SIGSEGV"):
        bare(CORTEX_A72, tmp_path).run([zero_page], 60)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    monkeypatch.setattr(arm64, "installation", lambda _: INSTALLED)
    monkeypatch.setattr(arm64, "POSITIONS", 64)
    yield INSTALLED


def tiny_artifact(folder: Path, device: str, target: str = "onnx", type: str = "int4") -> Artifact:
    """Lower a tiny model in whose layers one channel of the activations is much louder than the rest, as in real ones.

    All others of its row are rounded coarsely for its sake where a row has one scale.
    """
    source = folder / "source"
    if not source.is_dir():
        tiny_model(source, hidden=256)
        path = source / "model.safetensors"
        weights = load_file(path)
        for name, weight in weights.items():
            if "layernorm" in name:
                weight[5] *= LOUD
            elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                weight[:, 5] /= LOUD
        save_file(weights, path, metadata={"format": "pt"})
    model_folder = folder / device / "model"
    model_folder.mkdir(parents=True)
    chosen = load_target(target).on(load_device(device))
    with open_model(str(source)) as model:
        return lower(chosen, Compression(model, chosen.decide(model, type, "rtn")), type, model_folder).artifact


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (1, count))


@needs_system
def test_without_dotprod_the_logits_are_those_of_float_compute(tmp_path: Path, installed: Installation) -> None:
    artifact = tiny_artifact(tmp_path, "raspberry-pi-4")
    before = artifact.weights[0].read_bytes()
    found = arm64.settle(artifact, load_device("raspberry-pi-4"), random_tokens(100))
    assert [check.status for check in found.checks] == ["passed"] * 3
    assert "on an emulated Cortex-A72" in found.checks[0].detail
    assert "16 tokens on the emulated Cortex-A72" in found.checks[1].detail
    assert found.checks[2].value is not None
    assert found.checks[2].value < 1e-9
    assert {quantity.basis for quantity in found.quantities.values()} == {"emulated"}
    assert artifact.weights[0].read_bytes() == before
    assert not found.notes


@needs_system
def test_kernels_that_round_too_coarsely_are_found_and_replaced(
    tmp_path: Path, installed: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this model they cost 0.053 and 0.024 nats there, and 0.024 here.
    monkeypatch.setattr(arm64, "TIMES_HERE", 1.5)
    artifact = tiny_artifact(tmp_path, "core-ultra-200v")
    assert EMULATED.current(artifact) == KLEIDIAI
    found = arm64.settle(artifact, load_device("raspberry-pi-5"), random_tokens(100))
    assert [check.status for check in found.checks] == ["passed"] * 3
    kl = {name.rpartition(".")[2]: quantity.value for name, quantity in found.quantities.items()}
    assert kl["int8 in rows (KleidiAI)"] > 0.035 > kl["int8 in blocks"] > 1e-6 > kl["float32"]
    assert EMULATED.current(artifact) == WITHOUT_KLEIDIAI
    (note,) = found.notes
    assert (
        "activations are not rounded as planned: on the emulated Cortex-A76, int8 in blocks is the better way" in note
    )
    assert not list(artifact.folder.parent.glob(".setting-*"))


@pytest.mark.parametrize(
    ("target", "type"),
    [pytest.param("onnx", "int4", marks=needs_system), pytest.param("gguf", "Q4_K_M", marks=needs_programs)],
)
def test_a_runtime_for_newer_cores_fails_the_check(
    tmp_path: Path, installed: Installation, monkeypatch: pytest.MonkeyPatch, target: str, type: str
) -> None:
    # It says of itself that it has dotprod, so these kernels are taken; its instructions are an A72's.
    pretended = replace(CORTEX_A76, model=CORTEX_A72.model)
    monkeypatch.setattr(arm64, "stand_in", lambda _: pretended)
    artifact = tiny_artifact(tmp_path, "core-ultra-200v", target, type)
    found = arm64.settle(artifact, load_device("raspberry-pi-5"), random_tokens(100))
    assert [check.status for check in found.checks] == ["failed", "not run", "not run"]
    assert "met an instruction that it does not have (SIGILL)" in found.checks[0].detail


@needs_programs
@pytest.mark.parametrize("core", CORES, ids=lambda core: core.march)
def test_llama_cpp_computes_there_what_it_computes_here(
    tmp_path: Path, installed: Installation, monkeypatch: pytest.MonkeyPatch, core: Core
) -> None:
    monkeypatch.setattr(arm64, "stand_in", lambda _: core)
    artifact = tiny_artifact(tmp_path, "raspberry-pi-5", "gguf", "Q4_K_M")
    before = artifact.weights[0].read_bytes()
    found = arm64.settle(artifact, load_device("raspberry-pi-5"), random_tokens(100))
    assert [check.status for check in found.checks] == ["passed"] * 3
    assert f"llama.cpp ran the model on an emulated {core.name}" in found.checks[0].detail
    assert found.checks[1].value is not None
    assert found.checks[1].value < 1e-4
    assert found.checks[2].value is not None
    assert found.checks[2].value > 1e-6
    assert artifact.weights[0].read_bytes() == before
    assert not list(artifact.folder.parent.glob(".setting-*"))
