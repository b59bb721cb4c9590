"""What a budget is worth on models of families that were trained from a seed, beside round to nearest of equal bytes.

Each is trained for about a minute on prose, and compared on text of the same kind that it was not trained on.
"""

from pathlib import Path

import pytest

from exporter.pipeline import build
from exporter.planning.job import Job
from tests.reference import plain_texts
from tests.widths import trained

DEVICE = "raspberry-pi-5-8gb"
STEPS, WINDOW = 400, 256
# A budgeted `balanced` build may lose this share of what round to nearest loses.
MOST_RATIO = 0.7


@pytest.mark.parametrize(("target", "type"), [("gguf", "Q4_0"), ("onnx", "int4")])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_a_budget_beats_round_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, target: str, type: str
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    calibration, evaluation = plain_texts(tmp_path)
    trained(tmp_path / "model", calibration.read_text("utf-8"), STEPS, 0, family)

    def loss(name: str, **options: object) -> tuple[float, int]:
        report = build(
            Job(
                str(tmp_path / "model"), DEVICE, target, output=tmp_path / name, calibration=calibration,
                evaluation=evaluation, window=WINDOW, context=WINDOW, evaluation_windows=16, **options,
            )
        ).report  # fmt: skip
        return report.accuracy.kl_mean.value, int(report.size.file_bytes.value)

    nearest, size = loss("nearest", type=type, method="rtn", effort="fast")
    budgeted, ours = loss("budgeted", max_file_bytes=size, effort="balanced")
    ratio = budgeted / nearest
    print(f"\n{family} {target}: KL {budgeted:.4f} at {ours:,} bytes")
    print(f"{type} by rtn: KL {nearest:.4f} at {size:,} bytes; ratio {ratio:.2f}")
    assert ours <= size
    assert ratio <= MOST_RATIO
