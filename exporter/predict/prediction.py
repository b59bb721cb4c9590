"""Predicts speed, latency, memory and energy of a model's file on a device, each with an 80 % interval."""

from math import hypot, log

from exporter.device.profile import DeviceProfile
from exporter.foundation.quantities import Document
from exporter.predict.estimate import EIGHTY_PERCENT, Estimate, lognormal
from exporter.predict.memory_from_size import Memory
from exporter.predict.peak_memory import Peak
from exporter.predict.process_memory import held_bytes, peak_bytes
from exporter.predict.rates import rates
from exporter.predict.request import Request, checked_request
from exporter.predict.threads import ThreadChoice, threads
from exporter.predict.weight_residency import Residence, load_ms, paged, residence

# Standard deviations of the logarithm of a power: published meter readings, or recalled values.
PUBLISHED_WATTS_NOISE, ESTIMATED_WATTS_NOISE = 0.1, 0.3


class Prediction(Document):
    """The predicted performance of a model's file on a device.

    Attributes:
        device: The profile's name.
        backend: The backend.
        format: Format of the weights.
        context: Tokens in the cache.
        prompt: Tokens of the prompt.
        decode_tokens_per_s: Decode speed with a full context; from storage if weights will not stay in memory.
        sustained_decode_tokens_per_s: The same after minutes of load; absent if the profile gives no slowdown.
        prefill_tokens_per_s: Prefill speed.
        time_to_first_token_ms: Time from a prompt to the first token of the answer, with the model loaded.
        peak_bytes: Peak memory of the process, including mapped files.
        load_ms: Time of a first load.
        energy_per_token_joules: Energy of the whole device; absent if its power is unknown.
        threads: Threads on the CPU; absent on other backends.
        residence: Whether the process fits in memory while running.
        notes: Further notes.
    """

    device: str
    backend: str
    format: str
    context: int
    prompt: int
    decode_tokens_per_s: Estimate
    sustained_decode_tokens_per_s: Estimate | None = None
    prefill_tokens_per_s: Estimate
    time_to_first_token_ms: Estimate
    peak_bytes: Estimate
    load_ms: Estimate
    energy_per_token_joules: Estimate | None = None
    threads: ThreadChoice | None = None
    residence: Residence
    notes: tuple[str, ...] = ()


def predict(profile: DeviceProfile, request: Request, memory: Memory | Peak | None) -> Prediction:
    """Predict the performance of a model's file on a device.

    Args:
        profile: The device; runs in its profile are used as measured points.
        request: The model's file and how it is run.
        memory: The memory of its runtime for this model, or a model of it; None if it has none.

    Raises:
        RequestError: a number is out of bounds, or the backend or the format is unknown.
    """
    request = checked_request(request, profile)
    speeds, held = rates(profile, request), held_bytes(request, memory)
    place = residence(profile, held)
    decode = speeds.decode
    if place.status != "fits":
        slow = paged(decode, profile, request.file_bytes, held.value - place.limit_bytes)
        place = place.model_copy(update={"decode_in_memory": decode, "decode_from_storage": slow})
        decode = slow if place.status == "pages" else decode
    return Prediction(
        device=profile.name,
        backend=request.backend,
        format=request.format,
        context=request.context,
        prompt=request.prompt,
        decode_tokens_per_s=decode,
        sustained_decode_tokens_per_s=_sustained(profile, decode),
        prefill_tokens_per_s=speeds.prefill,
        time_to_first_token_ms=_first_token(speeds.prefill, decode, request.prompt),
        peak_bytes=peak_bytes(held, request, profile, memory),
        load_ms=load_ms(profile, request.file_bytes),
        energy_per_token_joules=_energy(profile, request.backend, decode),
        threads=threads(profile) if request.backend == "cpu" else None,
        residence=place,
        notes=tuple(_notes(profile, request)),
    )


def _first_token(prefill: Estimate, decode: Estimate, prompt: int) -> Estimate:
    def wait(pace: float, step: float) -> float:
        return 1e3 * (prompt / pace + 1 / step)

    return Estimate(
        value=wait(prefill.value, decode.value),
        low=wait(prefill.high, decode.high),
        high=wait(prefill.low, decode.low),
        unit="ms",
        how=f"a prompt of {prompt:,} tokens and one step of decoding, model loaded",
    )


def _sustained(profile: DeviceProfile, decode: Estimate) -> Estimate | None:
    share = profile.sustained_factor
    if share is None:
        return None
    how = f"{share.value:g} of the first runs' speed after minutes of load ({share.basis})"
    return Estimate(
        value=share.value * decode.value,
        low=share.value * decode.low,
        high=decode.high,
        unit=decode.unit,
        how=how,
    )


def _energy(profile: DeviceProfile, backend: str, decode: Estimate) -> Estimate | None:
    own = next((one for one in profile.backends if one.name == backend), None)
    watts = own and own.decode_watts
    if not watts:
        return None
    noise = ESTIMATED_WATTS_NOISE if watts.basis == "estimated" else PUBLISHED_WATTS_NOISE
    deviation = hypot(noise, log(decode.high / decode.low) / (2 * EIGHTY_PERCENT))
    how = f"{watts.value:g} W of the whole device while it decodes ({watts.basis})"
    return lognormal(log(watts.value / decode.value), deviation, "J/token", how)


def _notes(profile: DeviceProfile, request: Request) -> list[str]:
    names = [one.name for one in profile.backends]
    if request.backend in names:
        return []
    known = ", ".join(names)
    return [f"the profile lists no {request.backend} ({known}): predicted as for a device that has one"]
