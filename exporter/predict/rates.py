"""Predicts the speeds of a device from the fitted times, corrected by measurements on the device."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log

from exporter.device.backend import Backend, Kernel, Measured, TimedKernel
from exporter.device.profile import DeviceProfile
from exporter.foundation.errors import RequestError
from exporter.predict.coefficients import Coefficients, fitted
from exporter.predict.estimate import Estimate, lognormal
from exporter.predict.gaussian_process import Point, residual
from exporter.predict.request import Request
from exporter.predict.roofline import cpu_of, cycles_of
from exporter.predict.token_cost import Term, decode_terms, prefill_terms, weight_bytes
from exporter.predict.workload import Family, Machine, Workload, format_family

TOKENS_A_SECOND = "tokens/s"
INTEGER_DOT = {"dotprod", "i8mm", "avx2", "avx-vnni", "avx512", "avx512-vnni", "amx-int8"}
X86 = {"avx", "avx2", "fma", "f16c"}
# Bits per weight of whole files, for published runs that do not state the parameters.
BITS: dict[Family, float] = {"float": 16.0, "eight": 8.5, "k": 4.9, "four": 4.6, "low": 3.0}
# Standard deviations of a point's logarithm. Published runs of one device differ in system and build.
MEASURED_NOISE, PUBLISHED_NOISE = 0.05, 0.12
# The same for a profile's own rates: bandwidth fitted to several runs, and kernels that may differ from those used.
BANDWIDTH_NOISE, KERNEL_NOISE, CARRIED_OVER_NOISE = 0.15, 0.3, 0.5
# The same for kernels timed on the device: a token takes more than its products.
TIMED_NOISE = 0.05
# A mix holds more bits than the type that it is named after; the others are mostly of this type (llama.cpp).
BESIDE = "Q6_K"
# Kernel family of a profile -> format family.
KERNELS: dict[str, Family] = {
    "f32": "float", "f16": "float", "bf16": "float", "q8": "eight", "int8": "eight", "q4": "four", "int4": "four",
    "w4a16": "four", "k": "k", "iq": "low",
}  # fmt: skip
# A prompt of 4096 tokens ran at 0.64 of the prefill speed of 512 with 10^9 weights, and at 0.79 with 3 x 10^9 (Dragon
# Q8B, CIX P1, i5-4278U; llama.cpp); at 0.36 to 0.68 with 4 x 10^9 and at 0.25 to 0.75 with 0.6 x 10^9 (CPUs and Hexagon
# of Snapdragons; qualcomm/ai-hub-models). Attention grows with the prompt, and is a smaller share of a larger model.
USUAL_PROMPT, SAG, SAG_TOKENS, SAG_POWER = 512, 0.85, 4096 - 512, -0.2
SAG_DEVIATION = 0.3


@dataclass(frozen=True)
class Rates:
    """Predicted tokens per second."""

    decode: Estimate
    prefill: Estimate


def workload(profile: DeviceProfile, request: Request) -> Workload:
    """Return the facts that determine the speed of a request on a device."""
    own = _backend(profile, request.backend)
    peak = (own and own.peak_bandwidth_bytes_per_s) or profile.peak_bandwidth_bytes_per_s
    operations = own and own.peak_operations_per_s
    return Workload(
        backend=request.backend,
        machine=_machine(profile),
        bandwidth_bytes_per_s=peak.value,
        cycles_per_s=cycles_of(profile),
        products_per_s=cpu_of(profile).products_per_s,
        has_integer_dot=bool(INTEGER_DOT & set(profile.isa.features)),
        format=request.format,
        file_bytes=request.active * request.file_bytes,
        parameters=request.active * request.parameters,
        context=request.context,
        runtime=request.runtime,
        peak_operations_per_s=operations.value if operations else 0.0,
        processor=(own and own.processor) or "",
        kv_bytes_per_token=request.kv_bytes_per_token,
    )


def rates(profile: DeviceProfile, request: Request) -> Rates:
    """Predict the speeds of a model's file on a device.

    Args:
        profile: The device; each run in it is a measured point.
        request: A checked request.
    """
    work, model = workload(profile, request), fitted()
    decode = _points(profile, model.decode, decode_terms, lambda run: run.decode_tokens_per_s)
    prefill = _points(profile, model.prefill, prefill_terms, _usual_prefill)
    timed = _timed_shares(profile, work)
    bandwidth = list(_timed_decode_points(timed, work, model.decode) or _bandwidth_points(profile, work, model.decode))
    kernels = list(_timed_prefill_points(timed, work, model.prefill) or _kernel_points(profile, work, model.prefill))
    return Rates(
        _rate(work, decode_terms(work), model.decode, decode, bandwidth),
        at_length(_rate(work, prefill_terms(work), model.prefill, prefill, kernels), request),
    )


def at_length(usual: Estimate, request: Request) -> Estimate:
    """Return the prefill speed at the requested prompt length, from that at the usual 512 tokens."""
    slower = slowdown(request.active * request.parameters, request.prompt)
    if slower == 1:
        return usual
    wider = slower**SAG_DEVIATION
    return Estimate(
        value=usual.value / slower,
        low=usual.low / slower / wider,
        high=usual.high / slower * wider,
        unit=usual.unit,
        how=f"{usual.how}; {request.prompt:,} tokens",
    )


def slowdown(parameters: float, prompt: int) -> float:
    """Return the time per prompt token relative to the usual prompt of 512 tokens."""
    extra = max(prompt - USUAL_PROMPT, 0) / SAG_TOKENS
    return float(1 + SAG * (parameters / 1e9) ** SAG_POWER * extra)


def _usual_prefill(run: Measured) -> float | None:
    """Return a run's prefill speed, converted to a prompt of 512 tokens."""
    if run.prefill_tokens_per_s is None or run.parameters is None:
        return run.prefill_tokens_per_s
    return run.prefill_tokens_per_s * slowdown(run.parameters, run.prompt_tokens or USUAL_PROMPT)


def _rate(
    work: Workload, terms: Sequence[Term], model: Coefficients, runs: Sequence[Point], rates_known: Sequence[Point]
) -> Estimate:
    off = residual(work, [*runs, *rates_known], model)
    timed = sum(point.work.kind == work.kind for point in runs)
    known = [f"{timed} timed run{'s' * (timed > 1)} on this backend"] if timed else []
    known += ["the rates in its profile"] if rates_known else []
    how = " and ".join(["facts of the device", *known] if known else ["facts of the device alone"])
    return lognormal(log(1e3) - model.log_milliseconds(terms) - off.mean, off.deviation, TOKENS_A_SECOND, how)


def _points(
    profile: DeviceProfile,
    model: Coefficients,
    terms: Callable[[Workload], list[Term]],
    speed: Callable[[Measured], float | None],
) -> list[Point]:
    points = []
    for run in profile.measured:
        rate, work = speed(run), _workload_of(profile, run)
        if rate is not None and work is not None:
            error = log(1e3 / rate) - model.log_milliseconds(terms(work))
            points.append(Point(work, error, MEASURED_NOISE if run.basis == "measured" else PUBLISHED_NOISE))
    return points


def _workload_of(profile: DeviceProfile, run: Measured) -> Workload | None:
    """Return the workload of a run, or None if its format is of no known family."""
    try:
        family = format_family(run.format)
    except RequestError:
        return None
    parameters = run.parameters or round(8 * run.file_bytes / BITS[family])
    request = Request(
        run.file_bytes, parameters, run.format, run.backend, context=run.context or 64, runtime=run.runtime or ""
    )
    return replace(workload(profile, request), file_bytes=run.read_bytes or run.file_bytes)


def _bandwidth_points(profile: DeviceProfile, work: Workload, model: Coefficients) -> Iterator[Point]:
    """Yield a point for the profile's usable bandwidth, unless it is only estimated."""
    own = _backend(profile, work.backend)
    usable = own and own.usable_bandwidth_bytes_per_s
    if usable and usable.basis != "estimated":
        reading, *others = decode_terms(work)
        known = Term(1e3 * weight_bytes(work) / usable.value, {})
        error = model.log_milliseconds([known, *others]) - model.log_milliseconds([reading, *others])
        yield Point(work, error, BANDWIDTH_NOISE)


def _kernel_points(profile: DeviceProfile, work: Workload, model: Coefficients) -> Iterator[Point]:
    """Yield points for the profile's prefill speeds of kernels of the format's family."""
    own = _backend(profile, work.backend)
    kernels: Sequence[Kernel] = own.kernels if own else ()
    for kernel in kernels:
        pace = kernel.prefill_operations_per_s
        if pace is not None and KERNELS[kernel.family] == work.family:
            error = log(2e3 * work.parameters / pace.value) - model.log_milliseconds(prefill_terms(work))
            yield Point(work, error, CARRIED_OVER_NOISE if pace.basis == "estimated" else KERNEL_NOISE)


def _timed_shares(profile: DeviceProfile, work: Workload) -> list[tuple[TimedKernel, float]]:
    """Return the timed kernels of a format, each with its share of the weights; nothing if the format was not timed.

    A mix such as Q4_K_M is taken to be of the type in its name and, for the bits that it has more, of `BESIDE`.
    """
    own = _backend(profile, work.backend)
    name, bits = work.format.strip().upper().removeprefix("UD-"), 8 * work.file_bytes / work.parameters
    for timed in own.timed_kernels if own else ():
        base = _named_type(timed.speeds, name, bits)
        if base is None:
            continue
        beside = timed.speeds.get(BESIDE)
        if beside is None or beside.bits <= base.bits:
            return [(base, 1.0)]
        share = min(max((bits - base.bits) / (beside.bits - base.bits), 0.0), 1.0)
        return [(base, 1 - share), (beside, share)]
    return []


def _named_type(speeds: Mapping[str, TimedKernel], name: str, bits: float) -> TimedKernel | None:
    """Return the type that a format is named after: its longest prefix, or the largest of as many bits in the name."""
    prefixes = [known for known in speeds if re.match(rf"{re.escape(known.upper())}(_|$)", name)]
    if prefixes:
        return speeds[max(prefixes, key=len)]
    stem = re.match(r"I?Q\d_", name)
    alike = [one for known, one in speeds.items() if stem and known.startswith(stem[0]) and one.bits <= bits]
    return max(alike, key=lambda one: one.bits, default=None)


def _timed_decode_points(
    timed: Sequence[tuple[TimedKernel, float]], work: Workload, model: Coefficients
) -> Sequence[Point]:
    """Return a point for timed kernels: the time of the weights, and what is fitted of the cache and the fixed part."""
    if not timed:
        return []
    _, cached, fixed, _ = terms = decode_terms(work)
    weights_s = sum(share * work.parameters / one.decode_weights_per_s for one, share in timed)
    known = [Term(1e3 * weights_s, {}), cached, fixed]
    return [Point(work, model.log_milliseconds(known) - model.log_milliseconds(terms), TIMED_NOISE)]


def _timed_prefill_points(
    timed: Sequence[tuple[TimedKernel, float]], work: Workload, model: Coefficients
) -> Sequence[Point]:
    """Return a point for timed kernels with many tokens."""
    if not timed:
        return []
    weights_s = sum(share * work.parameters / one.prefill_weights_per_s for one, share in timed)
    return [Point(work, log(1e3 * weights_s) - model.log_milliseconds(prefill_terms(work)), TIMED_NOISE)]


def _backend(profile: DeviceProfile, name: str) -> Backend | None:
    return next((one for one in profile.backends if one.name == name), None)


def _machine(profile: DeviceProfile) -> Machine:
    if X86 & set(profile.isa.features):
        return "x86"
    if re.match(r"(Apple )?M\d", profile.soc):
        return "apple"
    if profile.device_class in ("phone", "tablet"):
        return "phone"
    return "board" if profile.device_class == "board" else "arm"
