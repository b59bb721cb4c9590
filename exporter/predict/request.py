"""A request for a prediction, which needs only facts about a model's file."""

from dataclasses import dataclass, replace
from typing import get_args

from exporter.device.backend import BackendName
from exporter.device.profile import DeviceProfile
from exporter.foundation.errors import RequestError
from exporter.predict.workload import backend_name, format_family

MOST_BYTES, MOST_PARAMETERS, MOST_CONTEXT = 1 << 42, 10**13, 1 << 24
LEAST_BYTES, LEAST_PARAMETERS, MOST_KV_BYTES = 1 << 20, 10**6, 1 << 26
LEAST_BITS, MOST_BITS = 0.5, 40.0


@dataclass(frozen=True)
class Request:
    """A model's file and how it is run.

    Attributes:
        file_bytes: Bytes of the weights.
        parameters: Weights of the model.
        format: Format as named by the runtime.
        backend: Processor and interface; see `exporter.predict.workload.backend_name`.
        context: Tokens in the cache, which determine its memory and the bytes that each token reads.
        prompt: Prompt tokens, for the time to the first token.
        runtime: Name of the runtime; empty for llama.cpp or a similar one.
        active: Share of the weights that a token uses: less than 1 for a model with experts.
        kv_bytes_per_token: Bytes of the float16 keys and values of one token; zero for as many as models of that size
            have.
    """

    file_bytes: int
    parameters: int
    format: str
    backend: str
    context: int = 512
    prompt: int = 512
    runtime: str = ""
    active: float = 1.0
    kv_bytes_per_token: int = 0


def is_predictable(file_bytes: int, parameters: int) -> bool:
    """Return whether a model's file is of a size that predictions are made for; see `checked_request`."""
    sizes = LEAST_BYTES <= file_bytes <= MOST_BYTES and LEAST_PARAMETERS <= parameters <= MOST_PARAMETERS
    return sizes and LEAST_BITS <= 8 * file_bytes / parameters <= MOST_BITS


def checked_request(request: Request, profile: DeviceProfile) -> Request:
    """Return the request with its backend's profile name; plain `gpu` or `npu` selects the device's first.

    Raises:
        RequestError: a number is out of bounds, two numbers are inconsistent, or a name is unknown.
    """
    for what, value, low, high in (
        ("the file's bytes", request.file_bytes, LEAST_BYTES, MOST_BYTES),
        ("the parameters", request.parameters, LEAST_PARAMETERS, MOST_PARAMETERS),
        ("the context", request.context, 1, MOST_CONTEXT),
        ("the prompt", request.prompt, 1, MOST_CONTEXT),
        ("the bytes of a token's keys and values", request.kv_bytes_per_token, 0, MOST_KV_BYTES),
    ):
        if not low <= value <= high:
            raise RequestError(f"{what} cannot be so many", got=f"{value:,}", expected=f"{low:,} to {high:,}")
    if request.prompt > request.context:
        raise RequestError(
            "the prompt exceeds the context",
            got=f"{request.prompt:,} and {request.context:,} tokens",
            next_step="give a larger --context or a shorter --prompt",
        )
    bits = 8 * request.file_bytes / request.parameters
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise RequestError(
            "the file's bytes and the parameters do not go together",
            got=f"{bits:.3g} bits a parameter",
            expected=f"{LEAST_BITS:g} to {MOST_BITS:g}",
            next_step="give bytes, and parameters as a whole number (7B is 7000000000)",
        )
    format_family(request.format)
    return replace(request, backend=_backend(request.backend, profile))


def _backend(text: str, profile: DeviceProfile) -> str:
    name = backend_name(text)
    if name in get_args(BackendName):
        return name
    names = [one.name for one in profile.backends]
    for known in names:
        if known.split(":")[0] == name:
            return known
    raise RequestError(f"the device has no {name}", where=profile.name, next_step=f"known: {', '.join(names)}")
