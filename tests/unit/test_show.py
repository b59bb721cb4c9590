"""What the commands print."""

import pytest

from exporter.cli import show


def test_a_log_gets_a_line_now_and_then_and_one_when_a_stage_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 5.0, 25.0, 30.0, 50.0, 51.0, 60.0, 61.0])
    advance = show._logged(lambda: next(times))
    for done in (0, 1, 2, 3, 8, 8):
        advance("statistics", done, 8)
    advance("prove", 0, 2)
    advance("prove", 2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "statistics             2/8, 25 s, about 75 s left",
        "statistics             8/8, 50 s",
        "prove                  2/2, 1 s",
    ]


def test_progress_in_a_log_goes_to_the_error_stream_unless_it_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with show.progress(enabled) as advance:
            advance("open", 1, 1)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "open                   1/1, 0 s\n")
