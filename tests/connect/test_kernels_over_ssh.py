"""Kernels timed over a real ssh server, by a program that needs nothing there, and what a budget makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bench import kernels
from exporter.bench.kernels import kernels_here, kernels_on, program_path, write_profile
from exporter.bench.measurement import Remote
from exporter.device.connect.connection import address_of
from exporter.device.connect.local import Local
from exporter.device.connect.machine import read_machine
from exporter.device.profile import load_device
from exporter.foundation.errors import RequestError
from exporter.predict.rates import rates
from exporter.predict.request import Request, checked_request
from exporter.targets.contract import budgeted, load_target
from exporter.targets.kernel_program import kernel_program
from tests.connect.sshd import Sshd

MACHINE = read_machine(Local())
ARCHITECTURE = kernels.ARCHITECTURES.get(MACHINE.architecture, "")
# Read before the tests get a cache of their own.
COMPILED = program_path(kernel_program(), ARCHITECTURE, MACHINE.features) if ARCHITECTURE == "x86_64" else Path()
# A machine of this kind, with more memory bandwidth than what lies in caches is read with.
DEVICE = "framework-desktop"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not COMPILED.is_file(), reason="not compiled; run edge-exporter bench --kernels once"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply little, with the program that was compiled before."""
    monkeypatch.setattr(kernels, "BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "PROMPT", 8)
    monkeypatch.setattr(kernels, "built", lambda *_: COMPILED)


def test_over_ssh_into_a_profile(sshd: Sshd, tmp_path: Path) -> None:
    found = kernels_on(Remote(address_of(sshd.address)), None, 1, 3)
    assert found.where == sshd.address and found.times.threads == 1
    assert all(one.decode_weights_per_s > 1e6 for one in found.speeds.values())
    path = tmp_path / "mine.toml"
    write_profile(found, DEVICE, path)
    plain, mine = load_device(DEVICE), load_device(str(path))
    request = Request(1_000_000_000, 1_700_000_000, "Q4_K_M", "cpu")
    before, after = (rates(one, checked_request(request, one)).decode for one in (plain, mine))
    assert before.value != after.value and "rates in its profile" in after.how
    speeds = mine.timed_kernels("gguf")
    assert speeds is not None
    assert budgeted(load_target("gguf").on(mine)).processor(mine).products_per_s == pytest.approx(
        speeds.speeds["Q4_0"].prefill_weights_per_s
    )


def test_here(monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(kernel_program(), formats=("Q4_0", "Q6_K", "F16"))
    monkeypatch.setattr(kernels, "kernel_program", lambda: few)
    found = kernels_here(None, 1, 2)
    assert found.where == "this machine" and found.machine.features == MACHINE.features
    assert set(found.speeds) == set(few.formats)


def test_another_device_is_refused_before_anything_is_sent(sshd: Sshd) -> None:
    with pytest.raises(RequestError, match="the machine is no raspberry-pi-5"):
        kernels_on(Remote(address_of(sshd.address)), "raspberry-pi-5", 1, 1)
