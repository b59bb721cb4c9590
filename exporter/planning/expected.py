"""What a model is expected to do on the named device: the numbers of `edge-exporter predict`, for a known model."""

from collections import Counter
from collections.abc import Iterable

from exporter.formats.group import Decision
from exporter.planning.resolve import ResolvedJob
from exporter.predict.prediction import Prediction, predict
from exporter.predict.request import Request, is_predictable
from exporter.predict.workload import is_known_format
from exporter.targets.contract import shape_of
from exporter.targets.facts import facts_of

# A usual prompt with a page of text in it; the length that published speeds are for.
PROMPT_TOKENS = 512
FLOAT16_BYTES = 2


def expected(resolved: ResolvedJob, scheme: str, decisions: list[Decision], file_bytes: int) -> Prediction | None:
    """Return what is expected on the job's device; None for a model smaller than those that predictions are made for.

    Args:
        resolved: The job.
        scheme: Name of the formats' mix.
        decisions: One for each matrix.
        file_bytes: Bytes of the model files.
    """
    decoder, context = resolved.model.decoder, resolved.job.context
    if not is_predictable(file_bytes, decoder.parameters):
        return None
    request = Request(
        file_bytes=file_bytes,
        parameters=decoder.parameters,
        format=format_of(scheme, ((one.format.name, one.stored_bytes) for one in decisions)),
        backend=resolved.backend.name,
        context=context,
        prompt=min(context, PROMPT_TOKENS),
        runtime=facts_of(resolved.target.name).runtime,
        active=decoder.active_parameters / decoder.parameters,
        kv_bytes_per_token=shape_of(decoder).cache_bytes(1, FLOAT16_BYTES),
    )
    return predict(resolved.device, request, resolved.target.estimated_peak(resolved.model, decisions, context))


def format_of(scheme: str, stored: Iterable[tuple[str, int]]) -> str:
    """Return the format that predicts a bundle's speed: its scheme, or the format with most of the model's bytes.

    Args:
        scheme: Name of the formats' mix.
        stored: Name of a matrix's format, with factors after a plus sign, and its bytes.
    """
    if is_known_format(scheme):
        return scheme
    taken: Counter[str] = Counter()
    for name, size in stored:
        taken[name.partition("+")[0]] += size
    return taken.most_common(1)[0][0] if taken else scheme
