"""The demo's model on emulated Arm cores: what float compute and each int8 compute give, and what it takes.

Needs `edge-exporter emulate setup`; some minutes on two idle cores, several times as long on busy ones. Seconds are
this machine's and say nothing of a device.
"""

import resource
import time
from pathlib import Path

import numpy as np
import pytest

from exporter.compress.compression import Compression
from exporter.device.profile import load_device
from exporter.emulate.arm64.setup import installation
from exporter.model.sources import open_model
from exporter.prove import arm64
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.emulated import emulation_needs

INSTALLED = installation(emulation_needs())


def demo_artifact(folder: Path, device: str, name: str, type: str) -> Artifact:
    target = load_target(name).on(load_device(device))
    with open_model("demo") as model:
        decisions = target.decide(model, type, "rtn")
        return lower(target, Compression(model, decisions), type, folder).artifact


@pytest.mark.parametrize(
    ("device", "target", "type", "positions"),
    [
        ("raspberry-pi-4", "onnx", "int4", 16),
        ("raspberry-pi-5", "onnx", "int4", 256),
        ("raspberry-pi-4", "gguf", "Q4_K_M", 256),
        ("raspberry-pi-5", "gguf", "Q4_K_M", 256),
        ("galaxy-s24-ultra", "gguf", "Q4_K_M", 256),
    ],
)
def test_the_demo_on_an_emulated_core(
    tmp_path: Path, device: str, target: str, type: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm64, "installation", lambda _: INSTALLED)
    artifact = demo_artifact(tmp_path, device, target, type)
    tokens = np.random.default_rng(0).integers(100, 3000, (1, positions))
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = arm64.settle(artifact, load_device(device), tokens)
    wall_s, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f"\n{device}, {target} {type}: {positions} positions, {wall_s:.0f} s here, {cpu_s:.0f} CPU seconds")
    for check in found.checks:
        print(f"  {check.status} {check.name}: {check.detail}")
    assert {check.status for check in found.checks} == {"passed"}
