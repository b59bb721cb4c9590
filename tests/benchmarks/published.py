"""Published speeds of language models on real devices, as workloads; each row of the file names its source."""

import csv
import re
from dataclasses import dataclass
from math import log
from pathlib import Path

from exporter.predict.rates import USUAL_PROMPT, slowdown
from exporter.predict.roofline import PRODUCTS_A_CYCLE
from exporter.predict.workload import Machine, Workload, backend_name, format_family

FILE = Path(__file__).parent / "published_bench.csv"
GIB = 1 << 30
# Bits of a weight, whole files, where the parameters are not stated.
BITS = {"float": 16.0, "eight": 8.5, "k": 4.9, "four": 4.6, "low": 3.0}
# One chip goes by several names; a variant of its clock or its package is the same chip.
SAME_SOC = {
    "CIX P1": "CIX CP8180", "Arrow/Lunar Lake Arc": "Lunar Lake",
    "Snapdragon 8 Gen 3 / Exynos 2400": "Snapdragon 8 Gen 3", "Tiger Lake AVX512-VNNI": "Tiger Lake",
}  # fmt: skip
# Rows collected after the coefficients of the first 190 had been fitted. Those held back are in no fit: they are of
# the same sources and devices as other rows, and tell how far a fit to those is off.
FIRST_OF_LATER = 1001
HELD_BACK = frozenset({*range(1246, 1250), *range(1251, 1257), *range(1286, 1290)})
FORMATS = {"4-bit (n/s)": "4-bit", "cactus INT8/INT4": "int8", "cactus": "int8"}
# The instructions of a processor's best kernels, and the cycles a second of its fast cores, in 10^9, together. Sources:
# cpuinfo dumps in hrw/arm-socs-table, and the sources named for these chips in the device profiles; recalled for the
# Exynos 2100, Snapdragon 888 and QCS9075.
CPUS = {
    "A16": ("i8mm", 2 * 3.46), "A17 Pro": ("i8mm", 2 * 3.78), "Apple M2 Max": ("i8mm", 8 * 3.7),
    "Apple M4 Max": ("i8mm", 8 * 4.4),
    "BCM2711": ("neon", 4 * 1.8), "BCM2712": ("dotprod", 4 * 2.4), "CIX CP8180": ("i8mm", 12 * 2.5),
    "Core i5-4278U": ("avx2", 2 * 2.9), "Exynos 2100 or Snapdragon 888": ("dotprod", 2.9 + 3 * 2.6),
    "Intel N150": ("avx-vnni", 4 * 3.6), "Qualcomm": ("i8mm", 8 * 2.4), "Qualcomm QCS9075": ("dotprod", 8 * 2.4),
    "Raphael Zen4 AVX512": ("avx512-vnni", 6 * 5.2), "Raptor Lake": ("avx-vnni", 8 * 5.5),
    "Ryzen AI 5 340": ("avx512-vnni", 6 * 4.8), "Snapdragon 7 Gen 3": ("i8mm", 4 * 2.5),
    "Snapdragon 8 Elite": ("i8mm", 2 * 4.3 + 6 * 3.5), "Snapdragon 8 Elite Gen 5": ("i8mm", 2 * 4.6 + 6 * 3.6),
    "Snapdragon 8 Gen 1": ("i8mm", 3.0 + 3 * 2.5), "Snapdragon 8 Gen 3": ("i8mm", 3.3 + 5 * 3.1),
    "Snapdragon 865": ("dotprod", 2.8 + 3 * 2.4), "Snapdragon X Elite": ("i8mm", 10 * 3.4),
    "Snapdragon X2 Elite": ("i8mm", 12 * 4.4), "Strix Halo": ("avx512-vnni", 16 * 5.0),
    "Strix Point": ("avx512-vnni", 4 * 5.1 + 8 * 3.3),
}  # fmt: skip
# What the speed of a backend depends on beside its bandwidth: generations of Hexagon by llama.cpp's
# docs/backend/snapdragon and qualcomm/ai-hub-models, and operations per second of neural processors by their profiles.
PROCESSORS = {
    ("npu", "Qualcomm QCS9075"): "Hexagon v73", ("npu", "Snapdragon X Elite"): "Hexagon v73",
    ("npu", "Snapdragon 8 Gen 3"): "Hexagon v75", ("npu", "Snapdragon 8 Elite"): "Hexagon v79",
    ("npu", "Snapdragon 8 Elite Gen 5"): "Hexagon v81", ("npu", "Snapdragon X2 Elite"): "Hexagon v81",
    **{("gpu", f"{name} Lake"): "Intel" for name in ("Lunar", "Meteor", "Panther", "Tiger")},
}  # fmt: skip
OPERATIONS = {"RK3588": 6e12, "RK3576": 6e12, "Lunar Lake": 48e12, "Meteor Lake": 11e12}
VENDORS = (
    (r"Apple|^A1\d", "Apple"), (r"Snapdragon|Qualcomm", "Qualcomm"), (r"^BCM", "Broadcom"), (r"^RK", "Rockchip"),
    (r"Strix|Ryzen|Raphael", "AMD"), (r"Lake|Core|Intel", "Intel"), (r"Orin|Thor", "NVIDIA"), (r"^CIX", "CIX"),
)  # fmt: skip
# KiB of a token's keys and values in float16, of models that were run with a full cache: 2 x 2 bytes x layers x heads
# of keys x their width, from their config.json.
KV_KIB = {
    "Falcon3 7B": 112, "Granite 3.1 8B": 160, "Llama 3 8B": 128, "Llama 3.1 8B": 128, "Llama 3.2 1B": 32,
    "Llama 3.2 3B": 112, "Mistral 7B": 128, "Phi-3.5 mini": 384, "Phi-4 mini": 128, "Qwen2 7B": 56, "Qwen3 0.6B": 112,
    "Qwen3 4B": 144, "Qwen3 8B": 144, "Qwen3-VL 4B": 144,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A published run.

    Attributes:
        number: Of the row in the file.
        device: Its name there.
        device_class: Its class there.
        soc: The chip, in one spelling.
        work: What ran.
        decode: Tokens/s of generation, zero where that is not stated.
        prefill: Tokens/s of a prompt of the usual length, zero where that is not stated.
    """

    number: int
    device: str
    device_class: str
    soc: str
    work: Workload
    decode: float
    prefill: float

    @property
    def place(self) -> tuple[str, str]:
        """Device and backend: what one measured point is about."""
        return self.device, self.work.backend


def published() -> list[Row]:
    """Return the rows that coefficients are fitted to.

    These are of dense models that fit their device's memory, with the size of the file and the bandwidth known.
    """
    return [row for row in _rows() if row.number not in HELD_BACK]


def held_back() -> list[Row]:
    """Return the rows of the same kind that are in no fit."""
    return [row for row in _rows() if row.number in HELD_BACK]


def vendor(soc: str) -> str:
    """Return who makes a chip."""
    return next((name for pattern, name in VENDORS if re.search(pattern, soc)), soc)


def _rows() -> list[Row]:
    with FILE.open(encoding="utf-8", newline="") as opened:
        lines = list(csv.DictReader(opened))
    return [
        _row(line)
        for line in lines
        if line["use_in_roofline"] == "1" and line["file_size_gib"] and line["peak_bw_gb_s"]
    ]


def soc_name(text: str) -> str:
    """Return the name of a chip without what is in brackets, and one name for each."""
    name = re.sub(r"\(.*?\)|\?", "", text).strip()
    return SAME_SOC.get(name, name)


def _row(line: dict[str, str]) -> Row:
    soc, name = soc_name(line["soc"]), FORMATS.get(line["quant"], line["quant"])
    size = float(line["file_size_gib"]) * GIB
    parameters = float(line["params_b"]) * 1e9 if line["params_b"] else 8 * size / BITS[format_family(name)]
    isa, cycles = CPUS.get(soc, ("neon", 0.0))
    backend = backend_name(line["backend"].replace("cpu/igpu n/s", "cpu"))
    side = backend.split(":")[0]
    work = Workload(
        backend=backend,
        machine=_machine(line["device_class"]),
        bandwidth_bytes_per_s=1e9 * float(line["peak_bw_gb_s"]),
        cycles_per_s=1e9 * cycles,
        products_per_s=1e9 * cycles * PRODUCTS_A_CYCLE[isa],
        has_integer_dot=isa != "neon",
        format=name,
        file_bytes=size,
        parameters=parameters,
        context=_context(line["gen_test"]),
        runtime=line["runtime"],
        peak_operations_per_s=OPERATIONS.get(soc, 0.0) if side == "npu" else 0.0,
        processor=PROCESSORS.get((side, soc), soc if side == "gpu" else ""),
        kv_bytes_per_token=1024 * next((kib for name, kib in KV_KIB.items() if line["model"].startswith(name)), 0),
    )
    decode, prefill = (float(line[key] or 0) for key in ("gen_tok_s", "prompt_tok_s"))
    prefill *= slowdown(parameters, _prompt(line["prompt_test"]))
    return Row(int(line["row"]), line["device"], line["device_class"], soc, work, decode, prefill)


def _context(test: str) -> int:
    """Return the tokens in the cache of a run such as `ctx4096`, `tg128 @ d16384` or `tg128`."""
    found = re.search(r"(?:ctx|@ d| at )(\d+)", test)
    return int(found[1]) if found else 64


def _prompt(test: str) -> int:
    """Return the tokens of a prompt such as `pp4096` or `109 tokens`."""
    found = re.match(r"pp(\d+)|(\d+) tokens", test)
    return int(found[1] or found[2]) if found else USUAL_PROMPT


def _machine(device_class: str) -> Machine:
    if "phone" in device_class:
        return "phone"
    for machine in ("x86", "apple"):
        if machine in device_class:
            return machine
    return "board" if "board" in device_class or "sbc" in device_class or "jetson" in device_class else "arm"


def log_milliseconds(tokens_per_s: float) -> float:
    """Return the logarithm of the time of a token."""
    return log(1e3 / tokens_per_s)
