"""Thirty builds killed at random moments, and three pairs side by side: all end in the bundle of a build alone.

Every build samples its calibration text. After one, two or five kills the next build
ends, with what they left, and nothing may be left then; `make test` does the same with fewer.
"""

from pathlib import Path

import pytest

from tests.killing import alone, kills, side_by_side, source

KILLS = 30


@pytest.mark.parametrize("in_a_row", [1, 2, 5])
def test_thirty_kills(tmp_path: Path, in_a_row: int) -> None:
    takes_s = alone(source(tmp_path))
    begun = kills(tmp_path, takes_s, KILLS // 3, in_a_row, in_a_row)
    print(f"{KILLS // 3} of {begun} builds killed, {in_a_row} before each that ended: all digests equal, nothing left")


def test_three_pairs_side_by_side(tmp_path: Path) -> None:
    alone(source(tmp_path))
    for _ in range(3):
        side_by_side(tmp_path)
