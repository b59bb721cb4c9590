"""The headline on one's own model: the table, and what is refused. The measurements are a benchmark's."""

from pathlib import Path

import pytest

from tests.benchmarks.headline import main, report
from tests.benchmarks.rows import KeptRows, Published, Row


def test_each_file_stands_beside_ours_of_no_more_bytes() -> None:
    rows = [
        Row("Q4_K_M", "stock", "gguf", 2000, 0.5, 0.7, kl_p99=3.0, kl_p999=5.0),
        Row("Q4_K_M", "ours", "gguf", 1990, 0.1, 0.9, 0.12, kl_p99=1.0, kl_p999=2.0),
    ]
    assert report(rows).splitlines()[-1] == (
        "| Q4_K_M | 2,000 | 1,990 | 0.5000 | 0.1000 | 3.0000 | 1.0000 | 5.0000 | 2.0000 | 70.0% | 90.0% | 0.20 |"
    )


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing.gguf"), "--output", str(tmp_path / "out")]) == 2
    assert "there is no such GGUF file" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    file = Published(tmp_path / "rows.json")
    first, second = (Row(name, "stock", "gguf", 2000, 0.5, 0.7) for name in ("Q4_K_M", "Q5_K_M"))
    before = KeptRows(file, "a model", {"machine": "one"})
    before.keep(first)
    before.keep(second)

    after = KeptRows(file, "a model", {"machine": "one"})
    assert after.row(*second.key, measure=lambda: pytest.fail("it is known")) == second
    assert file.latest("a model") == [second, first]
    after.finish()
    assert file.latest("a model") == after.rows == [second]

    elsewhere = KeptRows(file, "a model", {"machine": "another"})
    assert elsewhere.row(*second.key, measure=lambda: first) == first
