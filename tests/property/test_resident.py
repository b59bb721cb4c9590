"""Any bytes of any arrays of a coded file are read as they are in the original, and no others."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.coding import in_memory
from exporter.coding.container import PROFILES, code_file
from exporter.coding.in_memory import ResidentFile, Span
from exporter.coding.layout import FileSection, array_part
from exporter.foundation.errors import InputError

SIZE = 5000


def original(seed: int) -> bytes:
    return np.random.default_rng(seed).normal(0, 3, SIZE).round().astype(np.int8).tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> list[FileSection]:
    """Arrays in order, with gaps between them."""
    found, at = [], draw(st.integers(0, 300))
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([np.uint8, np.float16, np.float32, np.int64]))
        shape = (draw(st.integers(1, 40)), draw(st.integers(1, 8)))
        section = FileSection(at, array_part(shape, np.dtype(kind)))
        if at + section.part.bytes > SIZE:
            break
        found.append(section)
        at += section.part.bytes + draw(st.integers(0, 200))
    return found


@settings(max_examples=60, deadline=None)
@given(arrays(), st.integers(0, 3), st.sampled_from(PROFILES), st.data())
def test_bytes_of_arrays(sections: list[FileSection], seed: int, profile: str, data: st.DataObject) -> None:
    whole = original(seed)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "PIECE_BYTES", 256)
        path, coded = Path(folder) / "weights", Path(folder) / "weights.coded"
        path.write_bytes(whole)
        code_file(path, coded, profile)  # type: ignore[arg-type]
        path.unlink()
        file = ResidentFile(coded, sections[::-1])
        spans = []
        for section in sections:
            first = data.draw(st.integers(0, section.part.bytes - 1))
            spans.append(Span(section.start + first, data.draw(st.integers(0, section.part.bytes - first))))
        for held in (spans, spans[:1], spans):
            file.hold(held)
            read = file.read(held)
            assert [one.tobytes() for one in read] == [whole[span.start : span.end] for span in held]
        file.hold([])
        assert file.held_bytes == 0
        last = sections[-1]
        for outside in (Span(last.start + last.part.bytes, 1), Span(last.start, last.part.bytes + 1), Span(SIZE, 9)):
            with pytest.raises(InputError, match="holds no such array"):
                file.hold([outside])


@pytest.mark.parametrize("starts", [(0, 99), (-1, 200), (-1,), (0, SIZE - 50), (0, SIZE)])
def test_arrays_that_overlap_or_are_outside_are_refused(tmp_path: Path, starts: tuple[int, ...]) -> None:
    (tmp_path / "weights").write_bytes(original(0))
    code_file(tmp_path / "weights", tmp_path / "coded", "fast")
    with pytest.raises(InputError, match="holds no such array"):
        ResidentFile(
            tmp_path / "coded", [FileSection(start, array_part((10, 10), np.dtype(np.uint8))) for start in starts]
        )
