"""The program that times kernels, on emulated Arm cores: its products are those of the decoded weights."""

from dataclasses import replace

import pytest

from exporter.bench import kernels
from exporter.bench.kernels import kernels_emulated, program_path
from exporter.emulate.arm64.core import CORTEX_A76
from exporter.targets.kernel_program import kernel_program
from tests.oracle.test_arm64 import INSTALLED, needs_system

# A type that ggml rearranges, one of tables, and floats.
PROGRAM = replace(kernel_program(), formats=("Q4_0", "IQ3_S", "F32"))
# Read before the tests get a cache of their own.
COMPILED = program_path(PROGRAM, "aarch64", CORTEX_A76.features)

pytestmark = [
    pytest.mark.timeout(1200),
    needs_system,
    pytest.mark.skipif(
        not COMPILED.is_file(), reason="not compiled; run edge-exporter bench --kernels --emulated -d raspberry-pi-5"
    ),
]


def test_kernels_are_timed_on_an_emulated_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "EMULATED_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "EMULATED_PROMPT", 2)
    monkeypatch.setattr(kernels, "kernel_program", lambda: PROGRAM)
    monkeypatch.setattr(kernels, "installation", lambda _: INSTALLED)
    monkeypatch.setattr(kernels, "built", lambda *_: COMPILED)
    found = kernels_emulated("raspberry-pi-5", 1, 1)
    assert (found.where, found.basis) == ("emulated Cortex-A76", "emulated")
    assert {one.type for one in found.times.products} == set(PROGRAM.formats)
    assert len(found.times.products) == 4 * len(PROGRAM.formats)
