"""The memory that a build needs, and the disk space of its cache, from the arrays that each stage holds.

Arrays are counted at their sizes in float32 unless it says otherwise; the numbers of them follow from the code of each
stage.
"""

from collections.abc import Sequence

from exporter.calibrate.carried_keys import widest_state
from exporter.calibrate.layer_stream import TOKENS_AT_ONCE
from exporter.calibrate.statistics import disk_bytes, site_columns
from exporter.compress.compression import propagates_errors
from exporter.compress.effort import Effort
from exporter.formats.group import Decision, WeightGroup
from exporter.model.excerpt import excerpt_if_large
from exporter.model.model import Model
from exporter.planning.job import Job
from exporter.planning.recipe import Recipe

# Interpreter, torch, transformers and a runtime's libraries, with what is kept of finished stages.
BASE_BYTES = 500 << 20
# Squares of a site's width: both second moments, the damped one, double-precision factor and products, the result.
FACTOR_SQUARES = 8
# Copies of the largest matrix during encoding: source, target, decoded result, and one block of rows.
MATRIX_COPIES = 3.5
# What deriving a layer keeps of each token: arrays as wide as the residual stream, and as the feed-forward layer.
HIDDEN_COPIES, INTERMEDIATE_COPIES = 14, 9


def build_peak_bytes(
    model: Model,
    job: Job,
    recipe: Recipe,
    decisions: Sequence[Decision],
    file_bytes: int,
    runtime_peak_bytes: int,
) -> int:
    """Return the memory of the stage that needs most.

    Args:
        model: The source, which is the largest that any stage has.
        job: What is asked for.
        recipe: The steps and the effort.
        decisions: One for each weight group.
        file_bytes: Size of the artifact.
        runtime_peak_bytes: What the runtime takes with it.
    """
    matrix = 4 * max(group.size for group in model.groups())
    widest = max(site_columns(model).values())
    encoding = int(MATRIX_COPIES * matrix)
    factoring = FACTOR_SQUARES * 4 * widest**2
    comparing = _comparing_bytes(model, job, max(file_bytes, float_copy_bytes(model)), runtime_peak_bytes)
    rewriting = max((step.work(model).peak_bytes for step in recipe.rewriting), default=0)
    encoded = _propagation_bytes(model, job, recipe.spends, decisions) + max(factoring, encoding)
    return BASE_BYTES + max(_statistics_bytes(model, job, recipe.spends), encoded, comparing, rewriting)


def cache_bytes(model: Model, job: Job, recipe: Recipe) -> int:
    """Return the disk space that statistics, hidden states and sampled text take in the cache."""
    shape = model.decoder
    observed = 1 + sum(step.work(model).observes for step in recipe.rewriting)
    statistics = observed * disk_bytes(model, recipe.spends.calibration_windows * job.window)
    statistics += disk_bytes(model, min(job.evaluation_windows, recipe.spends.prediction_windows) * job.window)
    evaluated = 4 * job.window * shape.hidden * job.evaluation_windows
    sampling = 0 if job.calibration and job.evaluation else 34 * shape.parameters // 32
    return statistics + evaluated + sampling


def float_copy_bytes(model: Model) -> int:
    """Return the disk space of the float32 copy that the source, and then the artifact, is checked by."""
    return 4 * excerpt_if_large(model).decoder.parameters


def _statistics_bytes(model: Model, job: Job, effort: Effort) -> int:
    """Return a layer's weights, two sums for each site, what its derivative keeps, hidden states and layer inputs."""
    shape = model.decoder
    layer = _largest_layer(model)
    weights = 4 * sum(group.size for group in layer)
    moments = 2 * 4 * sum(columns**2 for columns in {group.site: group.columns for group in layer}.values())
    tokens = max(TOKENS_AT_ONCE, job.window)
    derivative = 4 * tokens * (HIDDEN_COPIES * shape.hidden + INTERMEDIATE_COPIES * max(shape.intermediate))
    text = effort.calibration_windows * job.window
    hidden = 3 * 4 * text * widest_state(shape)
    return weights + moments + derivative + hidden + _layer_inputs_bytes(model, text)


def _layer_inputs_bytes(model: Model, tokens: int) -> int:
    """Return the inputs that layers have of the tokens of a text, and the rows of the table that they are made of."""
    shape = model.decoder
    return 2 * 4 * min(shape.vocab, tokens) * shape.layers * shape.layer_input_width


def _largest_layer(model: Model) -> list[WeightGroup]:
    """Return the matrices of the layer that has most weights."""
    layers = [[linear.group for linear in block.linears.values()] for block in model.decoder.blocks]
    return max(layers, key=lambda layer: sum(group.size for group in layer))


def _propagation_bytes(model: Model, job: Job, effort: Effort, decisions: Sequence[Decision]) -> int:
    """Return what is kept of two models side by side: weights, hidden states, a matrix's inputs, their differences."""
    if not propagates_errors(effort, decisions):
        return 0
    shape = model.decoder
    tokens = effort.calibration_windows * job.window
    weights = 4 * sum(group.size for group in _largest_layer(model))
    last = max(group.columns for group in model.groups() if group.site in shape.last_sites)
    hidden = 4 * tokens * (widest_state(shape) + last) + _layer_inputs_bytes(model, tokens)
    return 2 * (weights + hidden) + 4 * 4 * max(site_columns(model).values()) ** 2


def _comparing_bytes(model: Model, job: Job, file_bytes: int, runtime_peak_bytes: int) -> int:
    """Return two heads, hidden states, the mapped artifact or its float copy, logits on both sides, and the runtime."""
    shape = model.decoder
    heads = 2 * 4 * shape.vocab * shape.hidden
    hidden = 2 * 4 * job.window * job.evaluation_windows * shape.hidden
    logits = 4 * shape.vocab * job.window // 2
    return heads + hidden + file_bytes + 6 * logits + runtime_peak_bytes
