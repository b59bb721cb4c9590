"""The demo compiled for a Snapdragon and proved on Qualcomm's emulator: what is placed, lost and taken.

    .venv/bin/python -m pytest tests/benchmarks/test_npu.py --timeout=0 -s

Needs the extra `npu-qualcomm`. Minutes on two idle cores; the emulator's speed says nothing of a device's. The figures
are written to docs/benchmarks/npu.md.
"""

import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from exporter import pipeline
from exporter.planning.job import Job
from exporter.report.data import Measurements
from exporter.targets.onnx_qdq.npu import qualcomm

PAGE = Path(__file__).parents[2] / "docs/benchmarks/npu.md"
DEVICE = "galaxy-s24-ultra"
# What stands below this heading is written anew.
FIGURES_HEADING = "## Figures\n"
FIGURES = {
    "npu.kl": "KL of the original against the emulator",
    "npu.same_graph_kl": "KL of the original against the same graph with float products on the CPU",
    "npu.added_kl": "KL of that graph against the emulator",
    "npu.compiled_bytes": "compiled files",
    "npu.compile_s": "time to compile",
}


def rows(measurements: Measurements, seconds: float) -> list[str]:
    """Return the table's lines."""
    found = [f"| {title} | {_figure(measurements, name)} |" for name, title in FIGURES.items()]
    checks = [
        f"| `{check.name}`: {check.status} | {check.detail} |"
        for check in measurements.checks
        if check.name[:4] == "npu."
    ]
    return ["| figure | |", "| --- | --- |", *found, f"| compiling and checking | {seconds:.0f} s |", *checks]


def _figure(measurements: Measurements, name: str) -> str:
    quantity = measurements.emulation[name]
    number = f"{quantity.value:.4f}" if quantity.unit == "nats" else f"{quantity.value:,.0f}"
    return f"{number} {quantity.unit}"


@pytest.mark.skipif(find_spec(qualcomm.MODULE) is None, reason=f"needs {qualcomm.INSTALL}")
def test_the_demo_on_the_emulator(tmp_path: Path) -> None:
    binaries = []
    for name in ("one", "other"):
        started = time.perf_counter()
        job = Job(source="demo", device=DEVICE, target="onnx-qdq", effort="fast", output=tmp_path / name)
        bundle = pipeline.build(job)
        print(f"built in {time.perf_counter() - started:.0f} s")
        binaries.append({entry.path: entry.sha256 for entry in bundle.manifest.files if entry.path.endswith(".bin")})
    measured = bundle.measurements
    (placed,) = (check for check in measured.checks if check.name == "npu.placed")
    assert placed.value == placed.limit == 210
    kl, here = (measured.emulation[name].value for name in ("npu.kl", "npu.same_graph_kl"))
    assert kl <= 1.15 * here
    assert binaries[0] == binaries[1]
    assert all(check.status == "passed" for check in measured.checks if check.name[:4] == "npu.")
    (stage,) = (one for one in measured.stages if one.name == "prove on the NPU")
    before = PAGE.read_text(encoding="utf-8").split(FIGURES_HEADING)[0]
    table = "\n".join(rows(measured, stage.seconds))
    PAGE.write_text(f"{before}{FIGURES_HEADING}\n{table}\n", encoding="utf-8")
