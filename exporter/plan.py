"""What a job would do and need, said before a weight is read."""

import time
from dataclasses import dataclass

import torch

from exporter.device.fit import check_fit
from exporter.device.profile import DeviceProfile, load_device
from exporter.job import Job
from exporter.measures import Check, Quantity
from exporter.model.model import Model
from exporter.targets.target import Target, load_target
from exporter.weights.group import Decision

# Nanoseconds a weight, measured on 2 cores of an x86-64 machine: encoding, and reading back twice.
ENCODE_NANOSECONDS = {"rtn": 90.0, "ldlq": 210.0}
READ_BACK_NANOSECONDS = 60.0
# Tokens a second of the sampler and of the runtimes follow the machine's float32 speed by about these factors.
SAMPLING_FLOPS_SHARE = 2.0
FIXED_SECONDS = 25.0
BASE_BYTES = 700 << 20


@dataclass(frozen=True)
class Plan:
    """Decisions and needs.

    Attributes:
        model_name: The model's name.
        device: The profile.
        target: The target.
        type: Named mix or format.
        method: Compression method.
        decisions: One for each weight group.
        file_bytes: Estimated size of the model files.
        runtime_peak_bytes: Estimated peak memory of the runtime at the job's context.
        build_peak_bytes: Estimated peak memory of the build.
        disk_bytes: Disk space that the build needs where the bundle is written.
        seconds: Estimated time of the build on this machine.
        checks: The estimates against the device's limits.
    """

    model_name: str
    device: DeviceProfile
    target: Target
    type: str
    method: str
    decisions: list[Decision]
    file_bytes: int
    runtime_peak_bytes: int
    build_peak_bytes: int
    disk_bytes: int
    seconds: float
    checks: tuple[Check, ...]


def make_plan(model: Model, job: Job) -> Plan:
    """Decide on every weight group and estimate sizes, memory and time; reads no weights.

    Raises:
        RequestError: the device, target, type or method is unknown, or they do not go together.
    """
    device = load_device(job.device)
    target = load_target(device.preferred.target if job.target == "auto" else job.target)
    kind, method = job.type or target.default_type, job.method or target.default_method
    decisions = target.decide(model, kind, method)
    file_bytes = target.estimated_file_bytes(model, decisions)
    peak = target.estimated_peak_bytes(model, decisions, job.context)
    quantity = Quantity(value=float(peak), unit="bytes", basis="estimated")
    return Plan(
        model_name=model.name,
        device=device,
        target=target,
        type=kind,
        method=method,
        decisions=decisions,
        file_bytes=file_bytes,
        runtime_peak_bytes=peak,
        build_peak_bytes=_build_peak(model, job, file_bytes),
        disk_bytes=file_bytes + (64 << 20),
        seconds=_seconds(model, job, method),
        checks=tuple(check_fit(device, file_bytes, quantity, "estimated")),
    )


def _build_peak(model: Model, job: Job, file_bytes: int) -> int:
    """Interpreter and libraries, the largest matrix in float32 five times, hidden states, and the artifact loaded."""
    largest = 4 * max(group.size for group in model.groups())
    hidden = 4 * job.window * model.architecture.hidden * (job.calibration_windows + 2 * job.evaluation_windows)
    logits = 4 * model.architecture.vocab * job.window
    return BASE_BYTES + 5 * largest + hidden + 2 * logits + file_bytes


def _seconds(model: Model, job: Job, method: str) -> float:
    """Sum the stages: float passes at this machine's measured speed, encoding and reading back by weights."""
    weights = model.architecture.parameters
    calibration, evaluation = job.calibration_windows * job.window, job.evaluation_windows * job.window
    sites = {group.site: group.columns for group in model.groups() if group.site != "tokens"}
    moments = 2.0 * calibration * sum(columns**2 for columns in sites.values())
    passes = 2.0 * weights * (calibration + 4 * evaluation)
    sampling = 0.0 if job.calibration and job.evaluation else SAMPLING_FLOPS_SHARE * 2.0 * weights * calibration
    flops = (moments + passes + sampling) / _flops_per_s()
    return FIXED_SECONDS + flops + weights * 1e-9 * (ENCODE_NANOSECONDS.get(method, 210.0) + READ_BACK_NANOSECONDS)


def _flops_per_s() -> float:
    """Return this machine's float32 speed at the shapes that layers have."""
    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2.0 * 512 * 1024 * 1024 / sorted(times)[len(times) // 2]
