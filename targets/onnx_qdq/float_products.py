"""Which matrix multiplications stay in floating point: those whose activations no 16-bit codes hold well.

A few tokens drive a few channels to tens of thousands (massive activations: Sun et al. 2024, section 2). The step of
codes that reach so far is then as large as what all other tokens have there.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from exporter.calibrate.ranges import ChannelRanges, output_place
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.method import method_kind, spread_rows
from exporter.formats.floats import FLOAT16
from exporter.formats.group import Decision
from exporter.model.model import Model
from exporter.targets.onnx_qdq.graph import parameters

LARGEST = float(np.finfo(np.float16).max)
# Of a matrix, to predict what rounding costs.
SAMPLED_ROWS = 128
# What codes of weights cost at most: methods that fit them to the text make it less.
NEAREST = method_kind("rtn")


def in_floats(given: Rewritten, decisions: Sequence[Decision]) -> list[Decision]:
    """Return the decisions with float16 where 16-bit codes of activations cost more than the codes of weights do.

    Both costs are KL divergences, predicted alike. What a step s of the inputs adds to the outputs of a row w has the
    variance |w|^2 s^2 / 12, and a step of the outputs themselves s^2 / 12; half the row's sensitivity times that is its
    KL (`exporter.calibrate.statistics`). A product whose values would leave the range of float16 keeps its codes.

    Args:
        given: The model in the coordinates that it is encoded in, and its statistics on the calibration text.
        decisions: The decisions so far.
    """
    return [_decided(given.model, given.statistics, one) for one in decisions]


def _decided(model: Model, statistics: Statistics, decision: Decision) -> Decision:
    group = decision.group
    if group.layer is None:
        return decision
    ranges = statistics.ranges(group.site), statistics.ranges(output_place(group.layer, group.part))
    site = statistics.site(group.site)
    if site is None or None in ranges:
        return decision
    inputs, outputs = (found for found in ranges if found is not None)
    rows = spread_rows(group.rows, SAMPLED_ROWS)
    weight, sensitivity = model.read_rows(group.name, rows), statistics.sensitivity(group.layer, group.part)[rows]
    steps = [_step(one) for one in (inputs, outputs)]
    variances = (steps[0] ** 2 * (weight.astype(np.float64) ** 2).sum(axis=1) + steps[1] ** 2) / 12
    lost = NEAREST.expected_error(weight, decision.format, site, np.zeros(group.columns, np.float32)).outputs
    of_activations, of_weights = float(sensitivity @ variances), float(sensitivity @ lost)
    if of_activations <= of_weights or max(one.largest.max() for one in (inputs, outputs)) > LARGEST / 2:
        return decision
    times = of_activations / of_weights if of_weights else np.inf
    reason = f"F16, since 16-bit codes of its activations would lose {times:.2g} times what codes of its weights do"
    return replace(decision, format=FLOAT16, reason=f"{decision.reason}; {reason}")


def _step(ranges: ChannelRanges) -> float:
    scale, _ = parameters(np.uint16, ranges)
    return float(scale)
