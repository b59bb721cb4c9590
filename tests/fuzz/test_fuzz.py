"""Mutations of every kind of input, the same ones each time, and bombs: each ends well or in one sentence."""

import platform

import pytest

from tests.fuzz.bombs import BOMBS
from tests.fuzz.fuzzing import fuzz
from tests.fuzz.subjects import SUBJECTS

COUNT = 200

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux alone counts a peak of memory anew")


@pytest.mark.parametrize("subject", sorted(SUBJECTS))
def test_mutations(subject: str) -> None:
    tally = fuzz(subject, 0, 0, COUNT)
    assert not tally.findings, "\n".join(map(str, tally.findings))
    assert tally.refused > COUNT // 4
    assert tally.accepted > 0


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str) -> None:
    tally = fuzz(bomb, 0, 0, 1)
    assert not tally.findings, str(tally.findings[0])
    assert tally.refused == 1
