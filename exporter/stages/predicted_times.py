"""How long each stage of a build will take on this machine: counted work over speeds measured on the spot.

The counted work is arithmetic (multiplications and additions of the matrices) and weights to encode. The machine's
speed at float32 products and at encoding each format is measured in about a second. The shares of that speed that
stages reach are fitted (`fitted.toml`).
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from exporter.calibrate.bf16_matmul import quick_products
from exporter.calibrate.second_moments import STRIPES, Site
from exporter.calibrate.statistics import site_columns
from exporter.compress.allocate import SAMPLED_ROWS, SAMPLED_TABLE_ROWS, Storage
from exporter.compress.compression import propagates_errors, weights_digest
from exporter.compress.effort import Effort
from exporter.compress.method import load_method, method_kind, relative_error
from exporter.formats.floats import FLOAT32
from exporter.formats.format import WeightFormat
from exporter.formats.group import Decision
from exporter.foundation.fitted import fitted_constants
from exporter.model.model import Model
from exporter.planning.build_footprint import float_copy_bytes
from exporter.planning.resolve import ResolvedJob
from exporter.planning.step import Draft
from exporter.prove.prompt import DECODE_TOKENS
from exporter.prove.proof import REPEATS, ROUNDING_SHARE
from exporter.prove.source_check import WINDOWS as SOURCE_WINDOWS
from exporter.targets.contract import sampling_target

FITTED = fitted_constants("exporter.stages")
LAYERS_SHARE, SAMPLING_SHARE, PROMPT_SHARE, FACTOR_SHARE, BESIDE_PRODUCTS = (
    FITTED[name].value for name in ("layers_share", "sampling_share", "prompt_share", "factor_share", "beside_products")
)
TIMES_WITH_FACTORS = FITTED["times_with_factors"].value
DECODED_BYTES_PER_SECOND = FITTED["decoded_bytes_per_second"].value
COMPARE_NANOSECONDS, READ_BACK_NANOSECONDS = (
    FITTED[name].value for name in ("compare_nanoseconds", "read_back_nanoseconds")
)
OPEN_SECONDS, VOCABULARY_SECONDS, CHILD_SECONDS, PARITY_SECONDS = (
    FITTED[name].value for name in ("open_seconds", "vocabulary_seconds", "child_seconds", "parity_seconds")
)
PROBE_ROWS, PROBE_COLUMNS = 1024, 512


def stage_seconds(resolved: ResolvedJob, draft: Draft, file_bytes: int) -> dict[str, float]:
    """Return stage -> seconds of a build that finds nothing in the cache; reads no weights.

    Args:
        resolved: The job.
        draft: Its decisions before statistics.
        file_bytes: Estimated size of the model files.
    """
    job, original, model = resolved.job, resolved.original, resolved.model
    flops_per_s = _flops_per_s()
    with quick_products():
        layer_flops_per_s = 1 / (1 / _flops_per_s() + BESIDE_PRODUCTS / flops_per_s)
    evaluation = job.evaluation_windows * job.window
    token, before = _token_flops(model, job.window), _token_flops(original, job.window)
    prompt = token / (PROMPT_SHARE * flops_per_s)
    checked = SOURCE_WINDOWS * job.window
    checking = _copying(original, resolved.effort, checked * (before / (LAYERS_SHARE * flops_per_s) + prompt))

    def statistics(of: Model, windows: int) -> float:
        """Return the seconds of running some windows forwards, forwards again and backwards."""
        return windows * job.window * (3 * _token_flops(of, job.window) + _moment_flops(of)) / layer_flops_per_s

    windows = resolved.effort.calibration_windows
    return {
        "open": OPEN_SECONDS,
        "calibration text": _sampling(resolved, before / (SAMPLING_SHARE * flops_per_s)),
        **({"check the source": checking} if original.single_file else {}),
        **_rewriting(resolved, statistics(original, windows), flops_per_s),
        "statistics": statistics(model, windows + resolved.prediction_windows),
        "allocate": _prediction(draft.storages, resolved.effort, flops_per_s),
        "predict": 2 * _prediction([Storage.of(one) for one in draft.decisions], resolved.effort, flops_per_s),
        "compress and lower": VOCABULARY_SECONDS
        + _encoding(draft.decisions, resolved.effort, flops_per_s)
        + _correcting(resolved, draft.decisions, layer_flops_per_s, flops_per_s),
        "prove": 2 * CHILD_SECONDS
        + PARITY_SECONDS
        + (1 + REPEATS) * job.context * prompt
        + REPEATS * DECODE_TOKENS * file_bytes / DECODED_BYTES_PER_SECOND
        + evaluation * (before + token / ROUNDING_SHARE) / (LAYERS_SHARE * flops_per_s)
        + model.decoder.parameters * 1e-9 * READ_BACK_NANOSECONDS
        + evaluation * prompt
        + evaluation / 2 * model.decoder.vocab * 1e-9 * COMPARE_NANOSECONDS
        + _copying(model, resolved.effort, evaluation / ROUNDING_SHARE * prompt),
    }


def _copying(model: Model, effort: Effort, running_s: float) -> float:
    """Return the seconds of writing a model's float32 copy, and of running it, which takes so long for a whole one."""
    weights = float_copy_bytes(model) / 4
    share = weights / model.decoder.parameters
    nanoseconds = READ_BACK_NANOSECONDS + _encode_nanoseconds("rtn", FLOAT32, effort)
    return CHILD_SECONDS + weights * 1e-9 * nanoseconds + share * running_s


def _rewriting(resolved: ResolvedJob, statistics_s: float, flops_per_s: float) -> dict[str, float]:
    """Return the seconds of the stage in which the recipe's steps make the model smaller, if it has such steps."""
    works = [step.work(resolved.original) for step in resolved.recipe.rewriting]
    seconds = sum(w.operations / (FACTOR_SHARE * flops_per_s) + w.observes * statistics_s for w in works)
    return {"rewrite": seconds} if works else {}


def _token_flops(model: Model, window: int) -> float:
    """Return the arithmetic of one token of a window: its matrices, and on average half a window of keys and values."""
    shape = model.decoder
    attending = (width for width, kernel in zip(shape.head_dims, shape.convolutions, strict=True) if kernel is None)
    attention = 4 * shape.heads * sum(attending) * window / 2
    return 2.0 * shape.parameters + attention


def _moment_flops(model: Model) -> float:
    """Return the arithmetic of one token's second moments."""
    return (1 + 1 / STRIPES) * sum(columns**2 for columns in site_columns(model).values())


def _sampling(resolved: ResolvedJob, token_seconds: float) -> float:
    job, effort = resolved.job, resolved.effort
    if job.calibration and job.evaluation:
        return 0.0
    tokens = (effort.calibration_windows + job.evaluation_windows) * job.window
    weights = resolved.original.decoder.parameters
    quick = weights * 1e-9 * _encode_nanoseconds("rtn", sampling_target().base_formats[8], effort)
    return VOCABULARY_SECONDS + quick + tokens * token_seconds


def _prediction(storages: Sequence[Storage], effort: Effort, flops_per_s: float) -> float:
    """Return the seconds of encoding some rows to the nearest, and of each site's factor and its products."""
    names = {format.name: format for storage in storages for format in storage.formats}
    speeds = {name: _encode_nanoseconds("rtn", format, effort, SAMPLED_ROWS) for name, format in names.items()}
    seconds = 0.0
    for storage in storages:
        for group in storage.groups:
            rows = min(group.rows, SAMPLED_TABLE_ROWS if group.layer is None else SAMPLED_ROWS)
            seconds += sum(rows * group.columns * 1e-9 * speeds[format.name] for format in storage.formats)
    sites = {group.site: group.columns for storage in storages for group in storage.groups}
    factors = sum(columns**3 for columns in sites.values())
    return seconds + (2 / 3 / FACTOR_SHARE + 2 / 3) * factors / flops_per_s


def _encoding(decisions: list[Decision], effort: Effort, flops_per_s: float) -> float:
    """Return the seconds of all matrices: weights at the measured speeds, and what grows faster than their number.

    Codes that are taken from the source cost nothing beside them.
    """
    encoded = [decision for decision in decisions if not method_kind(decision.method).keeps_codes]
    kinds = {(decision.method, decision.format.name): decision for decision in encoded}
    speeds = {kind: _encode_nanoseconds(decision.method, decision.format, effort) for kind, decision in kinds.items()}
    seconds = 0.0
    for decision in encoded:
        size, columns = decision.group.size, decision.group.columns
        feedback = method_kind(decision.method).error_feedback
        sweeps = effort.sweeps if feedback else 0
        own = size * 1e-9 * speeds[decision.method, decision.format.name]
        own += (4.0 * (1 + sweeps) * size * columns + feedback * 2 / 3 * columns**3 / FACTOR_SHARE) / flops_per_s
        seconds += own * (TIMES_WITH_FACTORS if decision.low_rank else 1)
    return seconds


def _correcting(
    resolved: ResolvedJob, decisions: list[Decision], layer_flops_per_s: float, flops_per_s: float
) -> float:
    """Return the seconds of two models side by side through the layers, and of their difference at each site."""
    if not propagates_errors(resolved.effort, decisions):
        return 0.0
    model, hidden = resolved.model, resolved.model.decoder.hidden
    layers = [group for group in model.groups() if group.layer is not None]
    sites = {group.site: group for group in layers}
    tokens = resolved.effort.calibration_windows * resolved.job.window
    models = 2 * sum(group.size for group in layers)
    moments = sum(
        (1 + (1 + 1 / STRIPES) / 2) * one.columns**2 + hidden * one.columns * (one.site in model.decoder.last_sites)
        for one in sites.values()
    )
    factors = sum(one.columns**3 for one in sites.values()) / 3
    return 2.0 * tokens * (models + moments) / layer_flops_per_s + factors / FACTOR_SHARE / flops_per_s


def _encode_nanoseconds(method: str, format: WeightFormat, effort: Effort, rows: int = PROBE_ROWS) -> float:
    """Return the time a weight takes to be encoded, decoded and digested, measured on random weights.

    What a call takes by itself is shared by as many rows as it is given: it is most of the time where they are few.
    """
    chance = np.random.default_rng(0)
    columns = PROBE_COLUMNS
    if not format.fits(columns):
        # Whole rows are its blocks.
        columns = format.block_columns
    weight = chance.standard_normal((rows, columns), np.float32)
    inputs = chance.standard_normal((2 * columns, columns), np.float32)
    second_moment = inputs.T @ inputs / np.float32(len(inputs))
    site = Site(second_moment, second_moment, 0.0, np.ascontiguousarray(second_moment.diagonal()), {})

    def encode() -> None:
        planned = load_method(method, effort).encode(weight, format, site).planned
        weights_digest(planned)
        relative_error(weight, planned, None)

    return 1e9 * _median_seconds(encode, 3) / weight.size


def _flops_per_s() -> float:
    """Return this machine's float32 speed at the shapes that layers have."""
    left, right = torch.ones(2048, 1024), torch.ones(1024, 1024)
    return 2.0 * 2048 * 1024 * 1024 / _median_seconds(lambda: left @ right, 12)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]
