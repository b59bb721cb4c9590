"""Kernel speeds of a device: from times to a profile, from a profile to prices and predictions, and what is refused."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from typer.testing import CliRunner

from exporter.bench import kernels
from exporter.bench.kernels import KernelBench, built, kernels_emulated, speed_of, write_profile
from exporter.bench.results import KernelTimes, parsed
from exporter.cli.main import app
from exporter.compress.allocate import Choice, Limits, stored_bytes
from exporter.device.connect.connection import Advance, ShellResult
from exporter.device.connect.machine import Machine
from exporter.device.connect.remote_folder import RemoteFolder
from exporter.device.connect.shell import Line
from exporter.device.profile import DeviceProfile, load_device
from exporter.device.profile_writer import profile_toml
from exporter.foundation.config_files import checked
from exporter.foundation.errors import InputError, MissingDependencyError, RequestError
from exporter.model.sources import open_model
from exporter.planning.budget import Budget, cpu_as_predicted
from exporter.planning.budget import chosen as chosen_of
from exporter.predict.rates import rates
from exporter.predict.request import Request, checked_request
from exporter.targets.contract import budgeted, load_target
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.gguf.kernels import KERNELS, settings
from exporter.targets.kernel_program import kernel_program
from tests.models import tiny_model

NAMES = KERNELS.formats
SHAPES = ((512, 512, 1), (2048, 1024, 1), (4096, 4096, 1), (2048, 2048, 256))
PI = "raspberry-pi-5"
HOME = Line("/tmp")
# Floats take longer to read.
FLOATS = {"F16": 200.0, "F32": 500.0}
CPUINFO = "Linux\naarch64\n\nprocessor : 0\nprocessor : 1\nprocessor : 2\nprocessor : 3\nFeatures : asimd asimddp\n"


def times(changes: Sequence[tuple[int, dict[str, Any]]] = (), **picoseconds: float) -> str:
    """Return the answer of a device that takes 5 µs for a product and 100 ps for a weight, but for some types."""
    products = []
    for rows, columns, tokens in SHAPES:
        for name in NAMES:
            per_weight = picoseconds.get(name, FLOATS.get(name, 100.0)) * (0.1 if tokens > 1 else 1)
            ns = int(5_000 * (tokens == 1) + rows * columns * tokens * per_weight / 1e3)
            reference = int(5_000 * (tokens == 1) + rows * columns * tokens * 0.1 * (0.1 if tokens > 1 else 1))
            # The machine is half as fast in one turn.
            products.append(
                {
                    "type": name, "rows": rows, "columns": columns, "tokens": tokens,
                    "row_bytes": ggml_format(name).stored_bytes(1, columns),
                    "reference_ns": [reference, 2 * reference, reference], "ns": [ns, 2 * ns, ns],
                }
            )  # fmt: skip
    for index, change in changes:
        products[index].update(change)
    return json.dumps({"threads": 4, "time": "2026-11-29T12:00:00Z", "products": products})


def bench(text: str, basis: Any = "measured") -> KernelBench:
    machine = Machine("Linux", "aarch64", "A board", 4, 8 << 30, frozenset({"neon", "dotprod"}))
    return KernelBench("a board", machine, KERNELS, parsed(KernelTimes, text, "a board"), basis)


def timed(folder: Path, **picoseconds: float) -> DeviceProfile:
    """Return a Raspberry Pi 5 whose kernels were timed."""
    path = folder / "mine.toml"
    path.unlink(missing_ok=True)
    write_profile(bench(times(**picoseconds)), PI, path)
    return load_device(str(path))


def test_a_product_takes_a_constant_and_a_time_for_each_weight() -> None:
    found = bench(times(Q6_K=160.0)).speeds
    assert set(found) == set(NAMES)
    assert found["Q4_0"].decode_weights_per_s == pytest.approx(1e10, rel=0.01)
    assert found["Q6_K"].decode_weights_per_s == pytest.approx(6.25e9, rel=0.01)
    assert found["Q6_K"].product_seconds == pytest.approx(5e-6, rel=0.05)
    assert found["Q6_K"].prefill_weights_per_s == pytest.approx(6.25e10, rel=0.01)
    assert found["Q6_K"].bits == 6.5625
    assert bench(times()).spread == pytest.approx(0.25)


def test_times_that_vary_with_the_machine_do_not_count() -> None:
    # Q4_K's turns with one token were all taken while the machine was three times as slow.
    slow = [
        (index, {key: [3 * ns for ns in product[key]] for key in ("reference_ns", "ns")})
        for index, product in enumerate(json.loads(times())["products"])
        if product["type"] == "Q4_K"
    ]
    found = bench(times(slow)).speeds
    assert found["Q4_K"].decode_weights_per_s == pytest.approx(found["Q4_0"].decode_weights_per_s, rel=0.01)


def test_a_profile_with_kernel_speeds_reads_back(tmp_path: Path) -> None:
    profile = timed(tmp_path)
    known = profile.timed_kernels("gguf")
    assert known is not None and set(known.speeds) == set(NAMES)
    assert (known.basis, known.threads, known.runtime) == ("measured", 4, KERNELS.runtime)
    assert known.source == "edge-exporter bench --kernels, 2026-11-29T12:00:00Z, A board"
    # Timed again, the new speeds take the place of the old ones.
    write_profile(bench(times(Q4_0=80.0)), str(tmp_path / "mine.toml"), tmp_path / "again.toml")
    again = load_device(str(tmp_path / "again.toml"))
    (only,) = again.backend("cpu").timed_kernels
    assert only.speeds["Q4_0"].decode_weights_per_s == pytest.approx(1.25e10, rel=0.01)
    (tmp_path / "third").mkdir()
    (tmp_path / "third/again.toml").write_text(profile_toml(again), "utf-8")
    assert load_device(str(tmp_path / "third/again.toml")) == again


def test_a_profile_changes_what_a_budget_chooses(tmp_path: Path) -> None:
    """Where Q4_K's kernels are slow and Q4_1's are quick, a limit of time is kept with Q4_1."""
    quick = timed(tmp_path, Q4_K=500.0, Q5_K=500.0, IQ4_XS=500.0, IQ4_NL=500.0, Q4_0=500.0, Q4_1=60.0)
    with open_model(str(tiny_model(tmp_path / "model", hidden=256, intermediate=512))) as model:
        found = {}
        for device in (load_device(PI), quick):
            target = budgeted(load_target("gguf").on(device))
            storages = target.storages(model)
            cpu = cpu_as_predicted(target, model, storages, device)
            # The loss of a format falls with its bits, as it usually does.
            choices = [
                [Choice(format, stored_bytes(storage, format), 2.0 ** -(8 * format.stored_bytes(1, 256) / 256))
                 for format in storage.formats]
                for storage in storages
            ]  # fmt: skip
            most = sum(min(choice.bytes for choice in some if choice.format.name == "Q5_0") for some in choices)
            budget = Budget(Limits(bytes=most), 0, storages, "speed", target, cpu, [])
            found[device.name] = {one.format.name for one in chosen_of(budget, budget.all_timed(choices))}
    assert "Q4_1" not in found[PI] and "Q4_1" in found["mine"]


def test_prices_are_the_timed_ones(tmp_path: Path) -> None:
    profile = timed(tmp_path, Q6_K=160.0)
    target = budgeted(load_target("gguf").on(profile))
    cpu = target.processor(profile)
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        group = next(group for group in model.groups() if group.layer is not None)
    for name, per_weight in (("Q4_0", 100e-12), ("Q6_K", 160e-12)):
        found = cpu.decode_s(10**6, 1, target.throughput(group, ggml_format(name)))
        assert found == pytest.approx(5e-6 + 1e6 * per_weight, rel=0.01)
    # ONNX Runtime's kernels are others.
    onnx = budgeted(load_target("onnx").on(profile))
    assert onnx.processor(profile) == onnx.processor(load_device(PI))


@pytest.mark.parametrize(
    ("format", "bits", "per_weight"),
    [("Q4_0", 4.5, 100), ("Q4_K_M", 4.5, 140), ("Q4_K_M", 6.5625, 160), ("UD-Q4_K_XL", 4.5, 140), ("IQ3_M", 3.5, 180)],
)
def test_predictions_follow_timed_kernels(tmp_path: Path, format: str, bits: float, per_weight: float) -> None:
    # Published runs of other boards of the kind count, too; here there are none.
    plain, profile = map(without_runs, (load_device(PI), timed(tmp_path, Q4_K=140.0, Q6_K=160.0, IQ3_S=180.0)))
    parameters = 2_000_000_000
    request = Request(int(bits / 8 * parameters), parameters, format, "cpu")
    before, after = (rates(one, checked_request(request, one)) for one in (plain, profile))
    products = 1 / (parameters * per_weight * 1e-12)
    # The rest of a token is fitted, and the fit counts a little.
    assert products / 1.15 < after.decode.value < products * 1.1
    assert after.prefill.value == pytest.approx(10 * products, rel=0.25)
    assert after.decode.high / after.decode.low < before.decode.high / before.decode.low


def without_runs(profile: DeviceProfile) -> DeviceProfile:
    return profile.model_copy(update={"measured": ()})


def test_formats_that_were_not_timed_are_predicted_as_before(tmp_path: Path) -> None:
    plain, profile = load_device(PI), timed(tmp_path)
    request = Request(1_000_000_000, 2_000_000_000, "int4", "cpu")
    assert rates(plain, checked_request(request, plain)) == rates(profile, checked_request(request, profile))


def with_kernels(profile: DeviceProfile, backend: int = 0, **changes: Any) -> DeviceProfile:
    """Return a profile with changes of its timed kernels, or of the speed of Q4_0."""
    table = profile.model_dump()
    kept = next(one for one in table["backends"] if one["name"] == "cpu")["timed_kernels"][0]
    for key, value in changes.items():
        if key in kept["speeds"]["Q4_0"]:
            kept["speeds"]["Q4_0"][key] = value
        elif key == "name":
            kept["speeds"][value] = kept["speeds"]["Q4_0"]
        else:
            kept[key] = value
    return checked(table, DeviceProfile, "mine.toml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"basis": "emulated"}, "basis.*measured"),
        ({"threads": 5}, "more threads than cores; got 5, expected at most 4"),
        ({"threads": 0}, "threads"),
        ({"target": "../gguf"}, "target"),
        ({"decode_weights_per_s": 1e11}, "timed kernel of Q4_0 reads more than the memory gives"),
        ({"decode_weights_per_s": 0.5}, "decode_weights_per_s"),
        ({"prefill_weights_per_s": float("inf")}, "prefill_weights_per_s"),
        ({"product_seconds": -1.0}, "product_seconds"),
        ({"bits": 4500.0}, "bits"),
        ({"name": "Q4_0\x1b[31m"}, "speeds"),
        ({"speeds": {}}, "speeds"),
        ({"more": 1}, "more"),
    ],
)
def test_impossible_kernel_speeds_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    profile = timed(tmp_path)
    with pytest.raises(InputError, match=f"(?s){said}"):
        with_kernels(profile, **changes)


def test_kernels_of_a_gpu_and_of_one_target_twice_are_refused(tmp_path: Path) -> None:
    table = timed(tmp_path).model_dump()
    cpu = next(one for one in table["backends"] if one["name"] == "cpu")
    gpu = {"name": "gpu:vulkan", "timed_kernels": cpu["timed_kernels"]}
    with pytest.raises(InputError, match=r"timed_kernels are not the CPU's; got gpu:vulkan"):
        checked(table | {"backends": [cpu, gpu]}, DeviceProfile, "mine.toml")
    cpu["timed_kernels"] *= 2
    with pytest.raises(InputError, match="timed twice"):
        checked(table, DeviceProfile, "mine.toml")


def test_a_profile_without_a_type_is_refused_with_what_to_do(tmp_path: Path) -> None:
    profile = timed(tmp_path)
    known = profile.timed_kernels("gguf")
    assert known is not None
    few = with_kernels(profile, speeds={name: one.model_dump() for name, one in known.speeds.items() if name != "Q6_K"})
    with pytest.raises(InputError, match=r"timed kernels lack types.*got Q6_K.*bench --kernels"):
        load_target("gguf").on(few)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "threads"),
        (times([(0, {"ns": [1, 2]})]), "not as many"),
        (times([(0, {"ns": [0, 1, 2]})]), "ns"),
        (times([(0, {"rows": 1 << 40})]), "rows"),
        (times([(0, {"type": "Q4_0; rm"})]), "type"),
        (times([(0, {"ns": []})]), "ns"),
        (times()[:-2], "JSON"),
    ],
)
def test_answers_that_are_none_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"not one of the measuring program's.*{said}"):
        parsed(KernelTimes, text, "a board")


def test_times_that_do_not_grow_or_are_missing_are_refused() -> None:
    shrinking = [
        (len(NAMES) * shape + NAMES.index("Q4_0"), {"ns": [ns] * 3, "reference_ns": [100_000] * 3})
        for shape, ns in enumerate((100_000, 50_000, 1))
    ]
    found = parsed(KernelTimes, times(shrinking), "a board")
    for one in found.products:
        assert one.weights > 0
    with pytest.raises(InputError, match="did not time Q9_K"):
        speed_of(found, "Q9_K", "a board")


def test_an_emulations_times_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"speeds of an emulation are not those of a device; got emulated"):
        write_profile(bench(times(), "emulated"), PI, tmp_path / "mine.toml")
    assert list(tmp_path.iterdir()) == []


@dataclass
class Board:
    """A device that answers as it is told."""

    answer: ShellResult
    facts: str = CPUINFO
    where: str = "a board"
    parent: Line = HOME
    ran: list[str] = field(default_factory=list)
    sent: bytes = b""

    def run(self, command: Line, timeout_s: float) -> ShellResult:
        self.ran.append(command)
        if "uname" in command:
            return ShellResult(0, self.facts, "")
        if "sha256sum" in command:
            return ShellResult(0, hashlib.sha256(self.sent).hexdigest() + "\n", "")
        return self.answer if "kernels_main" in command and "exec" in command else ShellResult(0, "", "")

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        self.sent = source.read()
        advance(len(self.sent))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[str]]]:
    """Compile nothing; return what would have been."""
    asked: list[tuple[str, frozenset[str]]] = []
    (tmp_path / "kernels_main").write_bytes(b"program")

    def fake(_: object, architecture: str, features: frozenset[str]) -> Path:
        asked.append((architecture, features))
        return tmp_path / "kernels_main"

    monkeypatch.setattr(kernels, "built", fake)
    return asked


def run_on(board: Board, device: str | None = PI) -> KernelBench:
    @contextmanager
    def folder(name: str) -> Iterator[RemoteFolder]:
        yield RemoteFolder(board, f"/tmp/edge-exporter/{name}")  # type: ignore[arg-type]

    return kernels._kernels(folder, device, 0, 3)


def test_a_device_gets_a_program_for_its_instructions(program: list[tuple[str, frozenset[str]]]) -> None:
    board = Board(ShellResult(0, times(), ""))
    found = run_on(board)
    assert program == [("aarch64", frozenset({"neon", "dotprod"}))] and board.sent == b"program"
    (command,) = [one for one in board.ran if "exec" in one]
    # The profile's threads, the rounds, and every type of which formats are chosen.
    assert f"kernels_main 4 3 {kernels.BYTES} {kernels.PROMPT} Q4_0 {' '.join(NAMES)}" in command
    assert set(found.speeds) == set(NAMES) and found.basis == "measured"


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (132, "", "used an instruction that the device's processor lacks"),
        (137, "", "ended the program"),
        (1, "wrong products of q4_K on this processor: an error of 0.5", "wrong products of q4_K"),
        (126, "Permission denied", "Permission denied"),
    ],
)
def test_a_program_that_fails_is_an_error_with_its_words(program: object, code: int, errors: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        run_on(Board(ShellResult(code, "", errors)))


@pytest.mark.parametrize(
    ("facts", "device", "said"),
    [
        (CPUINFO.replace("asimddp", ""), PI, "the machine is no raspberry-pi-5.*without dotprod"),
        (CPUINFO.replace("Linux", "Darwin"), None, "timed on Linux and Android.*got Darwin"),
        (CPUINFO.replace("aarch64", "riscv64"), None, "no kernels are timed on this architecture.*got riscv64"),
    ],
)
def test_a_wrong_machine_is_refused(program: list[object], facts: str, device: str | None, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        run_on(Board(ShellResult(0, times(), ""), facts), device)
    assert program == []


def test_settings_use_no_instruction_that_a_processor_lacks() -> None:
    assert settings("aarch64", {"neon", "dotprod", "sve2"})["GGML_CPU_ARM_ARCH"] == "armv8.2-a+dotprod"
    assert settings("aarch64", {"neon"})["GGML_CPU_ARM_ARCH"] == "armv8-a"
    x86 = settings("x86_64", {"avx", "avx2", "fma", "f16c"})
    assert x86["GGML_AVX2"] == "ON" and x86["GGML_AVX512"] == x86["GGML_AVX_VNNI"] == "OFF"
    assert x86["GGML_NATIVE"] == "OFF" and "GGML_CPU_ARM_ARCH" not in x86


def test_without_a_compiler_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(MissingDependencyError, match=r"no compiler .* aarch64; .*apt-get install g\+\+-aarch64-linux"):
        built(kernel_program(), "aarch64", {"neon"})
    with pytest.raises(MissingDependencyError, match=r"apt-get install g\+\+ cmake"):
        built(kernel_program(), "x86_64", {"avx2"})


def test_only_arm_cores_are_emulated() -> None:
    with pytest.raises(RequestError, match="only Arm cores are emulated; got core-ultra-200v"):
        kernels_emulated("core-ultra-200v", 1, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no bundle is named; expected a folder, or --kernels"),
        (["bundle", "--kernels"], "a bundle does not go with --kernels"),
        (["--kernels", "--prompt", "8"], "--prompt does not go with --kernels"),
        (["--kernels", "--binary", "x"], "--binary does not go with --kernels"),
        (["--kernels", "--format", "llama-bench-md"], "llama-bench-md is for a bundle"),
        (["--kernels", "--folder", "x"], "--folder is for a device"),
        (["--kernels", "--profile", "mine.toml"], "no profile to start from"),
        (["--kernels", "--profile", "mine.json", "-d", PI], "ends with .toml"),
        (["--kernels", "--emulated"], "no device is named"),
        (["--kernels", "--emulated", "-d", PI, "--profile", "mine.toml"], "speeds of an emulation"),
        (["--kernels", "--emulated", "--on", "ssh://a@b"], "contradict each other"),
        (["--emulated"], "--emulated is for kernels"),
    ],
)
def test_what_goes_with_kernels(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(done.exception, RequestError) and said in str(done.exception)
