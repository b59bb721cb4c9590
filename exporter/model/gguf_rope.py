"""Rotary embeddings of a GGUF file: finds parameters that give the frequencies llama.cpp uses."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from exporter.formats.format import Float32
from exporter.model.rotary import rope_parameters, rotary_frequencies

Float64 = NDArray[np.float64]

FACTOR_TOLERANCE = 1e-6
# Converters compute the kept share of a frequency in float32; its error is multiplied by the factor.
SHARE_TOLERANCE = 2 * float(np.finfo(np.float32).eps)
# Both sides compute frequencies in float32 with different formulas.
FREQUENCY_TOLERANCE = 1e-5
# A kept share closer to 0 or 1 than this does not determine the slope.
PLATEAU = 1e-5
# llama.cpp's only values for `llama`, `qwen2` and `qwen3`.
BETA_FAST, BETA_SLOW = 32.0, 1.0
# high_freq_factor / low_freq_factor of every published llama3-scaled model.
USUAL_RATIO = 4.0


def llama3_parameters(factors: Float32, base: float) -> dict[str, float | int] | None:
    """Return the parameters of `llama3` scaling that give a tensor of factors.

    llama3 keeps frequencies with wavelengths below H = original / high_freq_factor. It divides those with wavelengths
    above L = original / low_freq_factor by `factor`. In between it mixes both, by a share linear in the frequency.
    Only `factor`, L and H matter.

    Args:
        factors: Divisors of the frequencies, float32 [head width / 2]: the tensor `rope_freqs.weight`.
        base: Base of the frequencies.

    Returns:
        Keys of `rope_parameters`, empty if no frequency is scaled; None if no parameters give these factors.
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
    """Yield candidates for factor, L and H."""
    factor = stored[-1]
    if factor <= 1:
        return
    # Kept share of each frequency.
    shares = (1 / stored - 1 / factor) / (1 - 1 / factor)
    between = np.flatnonzero((shares > PLATEAU) & (shares < 1 - PLATEAU))
    yield from ((factor, *ends) for ends in _ends(shares, waves, between))
    # Alternatively even the longest wavelength is below L, so the factor is undetermined.
    between = np.flatnonzero(1 / stored < 1 - PLATEAU)
    if len(between) > 1:
        slope, offset = np.polyfit(1 / waves[between], 1 / stored[between], 1)
        least = (max(offset, 0.0) + 1 / factor) / 2
        if slope > 0 and least > offset:
            yield 1 / least, slope / (least - offset), slope / (1 - offset)


def _ends(shares: Float64, waves: Float64, between: NDArray[np.int64]) -> Iterator[tuple[float, float]]:
    """Yield candidates for L and H, given the indices of shares between 0 and 1."""
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
    """Yield parameters with rounded numbers, then the exact ones."""
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
    """Return the divisors that llama3 applies to frequencies, given their wavelengths."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = (parameters["original_max_position_embeddings"] / waves - low) / (high - low)
    kept = np.clip(kept, 0, 1)
    divided: Float64 = 1 / ((1 - kept) / parameters["factor"] + kept)
    return divided


def same_yarn(config: PretrainedConfig, head_dim: int) -> bool:
    """Return whether llama.cpp and transformers compute the same `yarn` frequencies for a config.

    Both follow the same paper, but differ if the range of mixed frequencies is empty or reversed.
    """
    parameters = rope_parameters(config)
    base, factor = np.float32(parameters["rope_theta"]), parameters["factor"]
    original = np.float32(parameters["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        return float(head_dim * np.log(original / np.float32(turns * 2 * math.pi)) / (2 * np.log(base)))

    first, last = max(0, math.floor(dimension(BETA_FAST))), min(head_dim - 1, math.ceil(dimension(BETA_SLOW)))
    index = np.arange(head_dim // 2)
    kept = 1 - np.clip((index - first) / max(0.001, last - first), 0, 1)
    plain = float(base) ** (-2 * index / head_dim)
    by_llama_cpp = plain / factor * (1 - kept) + plain * kept
    by_transformers = rotary_frequencies(config)[0].astype(np.float64)
    return bool(np.abs(by_transformers / by_llama_cpp - 1).max() <= FREQUENCY_TOLERANCE)
