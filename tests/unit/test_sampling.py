"""Text that the model writes: seeded, whole, and drawn from its distribution."""

from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.sample import starts
from exporter.foundation.progress import silent
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.job import Job
from exporter.stages.sampled_text import sampled_windows
from exporter.targets.gguf.runtime import _drawn
from tests.models import VOCAB, tiny_model


def test_draws_follow_the_softmax() -> None:
    logits = np.array([0.5, -1.0, 2.0, -30.0, 1.0], np.float32)
    expected = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    evenly = (np.arange(100_000) + 0.5) / 100_000
    drawn = np.array([_drawn(logits, chance) for chance in evenly])
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / len(drawn), expected, atol=2e-5)
    assert _drawn(logits, 0.0) == 0
    assert _drawn(logits, np.nextafter(1.0, 0.0)) == 4


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path / "model")

    def sampled(cache: str, seed: int) -> np.ndarray:
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / cache))
        job = Job(str(folder), "pixel-9", seed=seed, window=96, calibration_windows=3, evaluation_windows=2)
        with open_model(str(folder)) as model:
            calibration, evaluation = sampled_windows(
                job, job.calibration_windows or 0, model, load_tokenizer(folder), silent
            )
        assert calibration.kind == evaluation.kind == "self-sampled"
        assert (calibration.tokens.shape, evaluation.tokens.shape) == ((3, 96), (2, 96))
        return np.concatenate([calibration.tokens, evaluation.tokens])

    first = sampled("one", 0)
    assert first.min() >= 0
    assert first.max() < VOCAB
    assert len({tuple(row) for row in first}) == 5
    np.testing.assert_array_equal(first, sampled("two", 0))
    assert not np.array_equal(first, sampled("one", 1))
    assert [path.suffix for path in (tmp_path / "one" / "samples").iterdir()] == [".npy", ".npy"]


def test_half_of_the_texts_begin_as_a_chat_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    begun = starts(tokenizer, 6, 0)
    opening = tokenizer.ids("<|im_start|>user\n")
    assert begun[::2] == [opening] * 3
    assert all(len(start) == 1 and start[0] not in tokenizer.special_ids for start in begun[1::2])
    assert begun == starts(tokenizer, 6, 0) != starts(tokenizer, 6, 1)
