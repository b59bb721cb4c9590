"""Rotary embeddings of a GGUF file: parameters that give the frequencies which llama.cpp computes with."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporter.formats.format import Float32

Float64 = NDArray[np.float64]

FACTOR_TOLERANCE = 1e-6
# Converters compute in float32 what share of a frequency is kept; in the factor, an error of it weighs factor-fold.
SHARE_TOLERANCE = 2 * float(np.finfo(np.float32).eps)
# Both sides compute frequencies in float32, by different formulas.
FREQUENCY_TOLERANCE = 1e-5
# Nearer to an end than this, the share of a frequency that is kept says nothing of the slope.
PLATEAU = 1e-5
# llama.cpp has no other values for `llama`, `qwen2` and `qwen3`.
BETA_FAST, BETA_SLOW = 32.0, 1.0
# high_freq_factor / low_freq_factor of every published model of this kind.
USUAL_RATIO = 4.0


def llama3_parameters(factors: Float32, base: float) -> dict[str, float | int] | None:
    """Return the parameters of `llama3` scaling that a tensor of factors follows from.

    llama3 keeps frequencies whose wave is shorter than H = original / high_freq_factor, divides those whose wave is
    longer than L = original / low_freq_factor by `factor`, and mixes both between, by a share that is linear in the
    frequency. Only `factor`, L and H matter.

    Args:
        factors: What frequencies are divided by, float32 [head width / 2]: the tensor `rope_freqs.weight`.
        base: Base of the frequencies.

    Returns:
        Keys of `rope_parameters`, empty where no frequency is scaled; None if no parameters give these factors.
    """
    stored = factors.astype(np.float64)
    waves = 2 * math.pi * base ** (np.arange(len(stored)) / len(stored))
    if not np.isfinite(stored).all() or (stored <= 0).any():
        return None
    if np.abs(stored - 1).max() <= FACTOR_TOLERANCE:
        return {}
    for factor, longest, shortest in _guesses(stored, waves):
        for parameters in _written(factor, longest, shortest):
            wrong = np.abs(_llama3_factors(parameters, waves) / stored - 1)
            if (wrong <= np.maximum(FACTOR_TOLERANCE, SHARE_TOLERANCE * stored)).all():
                return parameters
    return None


def _guesses(stored: Float64, waves: Float64) -> Iterator[tuple[float, float, float]]:
    """Yield factor, L and H that may give the factors."""
    factor = stored[-1]
    if factor <= 1:
        return
    # The share of each frequency that is kept.
    shares = (1 / stored - 1 / factor) / (1 - 1 / factor)
    between = np.flatnonzero((shares > PLATEAU) & (shares < 1 - PLATEAU))
    yield from ((factor, *ends) for ends in _ends(shares, waves, between))
    # Or the longest wave is not yet divided by the whole factor, which is then anyone's guess.
    between = np.flatnonzero(1 / stored < 1 - PLATEAU)
    if len(between) > 1:
        slope, offset = np.polyfit(1 / waves[between], 1 / stored[between], 1)
        least = (max(offset, 0.0) + 1 / factor) / 2
        if slope > 0 and least > offset:
            yield 1 / least, slope / (least - offset), slope / (1 - offset)


def _ends(shares: Float64, waves: Float64, between: NDArray[np.int64]) -> Iterator[tuple[float, float]]:
    """Yield L and H, given which shares lie between 0 and 1."""
    before, after = np.flatnonzero(shares >= 1 - PLATEAU), np.flatnonzero(shares <= PLATEAU)
    kept = waves[before[-1]] if len(before) else 0.0
    divided = waves[after[0]] if len(after) else math.inf
    if len(between) > 1:
        slope, offset = np.polyfit(1 / waves[between], shares[between], 1)
        if slope > 0 and offset < 0:
            yield -slope / offset, slope / (1 - offset)
    elif len(between) == 1:
        share, wave = shares[between[0]], waves[between[0]]
        longest = wave * (1 + (USUAL_RATIO - 1) * share)
        yield longest, longest / USUAL_RATIO
        # The flattest line through this share that leaves its neighbours at 1 and 0.
        falls = (1 - share) / (1 / kept - 1 / wave) if kept else 0.0
        slope = max(falls, share / (1 / wave - 1 / divided))
        yield 1 / (1 / wave - share / slope), 1 / (1 / wave + (1 - share) / slope)
    elif math.isfinite(divided):
        shortest = kept or divided / USUAL_RATIO**2
        yield divided ** (2 / 3) * shortest ** (1 / 3), divided ** (1 / 3) * shortest ** (2 / 3)


def _written(factor: float, longest: float, shortest: float) -> Iterator[dict[str, float | int]]:
    """Yield parameters with round numbers, then those that are exactly these."""
    if not 1 <= shortest < longest < math.inf:
        return
    original = round(longest)
    yield _parameters(float(f"{factor:.6g}"), 1.0, float(f"{longest / shortest:.4g}"), original)
    yield _parameters(factor, original / longest, original / shortest, original)


def _parameters(factor: float, low: float, high: float, original: int) -> dict[str, float | int]:
    return {
        "factor": float(factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_position_embeddings": original,
    }


def _llama3_factors(parameters: dict[str, float | int], waves: Float64) -> Float64:
    """Return what llama3 divides frequencies by, given their waves."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = (parameters["original_max_position_embeddings"] / waves - low) / (high - low)
    kept = np.clip(kept, 0, 1)
    divided: Float64 = 1 / ((1 - kept) / parameters["factor"] + kept)
    return divided


def same_yarn(config: PretrainedConfig, head_dim: int) -> bool:
    """Return whether llama.cpp's frequencies for `yarn` are those that transformers computes from the config.

    Both follow the same paper, but differ where the range of frequencies that are mixed is empty or turned round.
    """
    parameters = config.rope_parameters
    base, factor = np.float32(parameters["rope_theta"]), parameters["factor"]
    original = np.float32(parameters["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        return float(head_dim * np.log(original / np.float32(turns * 2 * math.pi)) / (2 * np.log(base)))

    first, last = max(0, math.floor(dimension(BETA_FAST))), min(head_dim - 1, math.ceil(dimension(BETA_SLOW)))
    index = np.arange(head_dim // 2)
    kept = 1 - np.clip((index - first) / max(0.001, last - first), 0, 1)
    plain = float(base) ** (-2 * index / head_dim)
    by_llama_cpp = plain / factor * (1 - kept) + plain * kept
    by_transformers = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0].double().numpy()
    return bool(np.abs(by_transformers / by_llama_cpp - 1).max() <= FREQUENCY_TOLERANCE)
