"""What is fitted to one text and counted on another, against the quadratic form written out."""

from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.evaluation_statistics import EvaluationStatistics
from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.awq_scaling import scaled_channels
from exporter.compress.methods.ldlq import DAMPING, Ldlq, damped
from exporter.compress.methods.rtn import RoundToNearest
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.targets.gguf.formats.ggml import ggml_format
from tests.models import tiny_model

SITE, NAME = "layers.0.mlp_in", "model.layers.0.mlp.up_proj.weight"
FORMAT = ggml_format("Q4_0")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with open_model(str(tiny_model(tmp_path / "model", hidden=64))) as model:
        return model


def windows(seed: int, least: int, most: int) -> Windows:
    return Windows.of(np.random.default_rng(seed).integers(least, most, (8, 40)), "file", 0)


@pytest.fixture
def met(model: Model) -> EvaluationStatistics:
    return EvaluationStatistics(
        *(collect(model, text, 0, silent) for text in (windows(0, 2, 100), windows(1, 100, 290)))
    )


def test_codes_are_fitted_to_one_text_and_count_on_the_other(model: Model, met: EvaluationStatistics) -> None:
    fitted, other = (collect(model, text, 0, silent) for text in (windows(0, 2, 100), windows(1, 100, 290)))
    here, there, both = fitted.read_site(SITE), other.read_site(SITE), met.site(SITE)
    assert here and there and both
    assert not np.allclose(here.second_moment, there.second_moment, rtol=0.05)
    np.testing.assert_array_equal(both.fitted, here.second_moment)
    np.testing.assert_allclose(both.second_moment, there.second_moment, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(both.squares, here.squares)
    assert both.fitted_shrinkage == here.shrinkage > 0
    np.testing.assert_array_equal(met.sensitivity(0, "up"), other.sensitivity(0, "up"))
    np.testing.assert_array_equal(met.lookups()[0], other.lookups()[0])
    assert met.key not in (fitted.key, other.key)
    assert met.site("tokens") is None


def test_the_error_of_rounding_is_that_of_the_other_text(model: Model, met: EvaluationStatistics) -> None:
    weight, site, columns = model.read(NAME), met.site(SITE), np.zeros(64, np.float32)
    assert site is not None
    change = RoundToNearest().encode(weight, FORMAT, site).planned - weight
    expected = np.einsum("ij,jk,ik->i", change, site.held.astype(np.float64), change)
    found = RoundToNearest().expected_error(weight, FORMAT, site, columns).outputs
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_error_of_feedback_spreads_as_fitted_and_costs_as_met(model: Model, met: EvaluationStatistics) -> None:
    weight, site, columns = model.read(NAME), met.site(SITE), np.zeros(64, np.float32)
    assert site is not None
    moment = damped(site.fitted, DAMPING, site.fitted_shrinkage).astype(np.float64)
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    spread = factor / factor.diagonal()[:, None]
    costs = np.einsum("ij,jk,ik->i", spread, site.held.astype(np.float64), spread)
    importance = np.ascontiguousarray(site.fitted.diagonal())
    change = FORMAT.decode_rows(FORMAT.encode_rows(weight, importance), 64) - weight
    found = Ldlq().expected_error(weight, FORMAT, site, columns).outputs
    np.testing.assert_allclose(found, change.astype(np.float64) ** 2 @ costs, rtol=1e-3)


def test_other_statistics_come_into_the_same_coordinates(model: Model) -> None:
    statistics = collect(model, windows(0, 2, 100), 0, silent)
    rewritten = scaled_channels(model, statistics)
    again, own = rewritten.of(statistics).site(SITE), rewritten.statistics.site(SITE)
    assert again and own
    np.testing.assert_array_equal(again.second_moment, own.second_moment)
