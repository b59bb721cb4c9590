"""Measures a model on the machine to which it is sent. It is standalone: Python 3.8, numpy and the model's runtime.

    python3 -I probe.py needs TARGET        which packages of the runtime are missing
    python3 -I probe.py selftest JOB.json   the model's answers to the self-test's prompt
    python3 -I probe.py measure JOB.json    the speed of prefill and decoding

It prints one JSON object. Tests are as in llama-bench: `n_prompt` tokens read at once, or `n_gen` generated one at a
time, either after `n_depth` tokens that are not timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import site
import sys
import time
from importlib.machinery import PathFinder
from importlib.metadata import version
from typing import Any

# Set before the import: otherwise ONNX Runtime contacts a host of its vendor and stores a device id in the home folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Modules, and the names of their packages for pip: required ones, then optional ones.
NUMPY, ORT = ("numpy", "numpy"), ("onnxruntime", "onnxruntime")
NEEDED = {"gguf": (NUMPY, ("llama_cpp", "llama-cpp-python")), "onnx": (NUMPY, ORT), "onnx-qdq": (NUMPY, ORT)}
GENAI = ("onnxruntime_genai", "onnxruntime-genai")
BATCH = 512
FIRST_ID, LAST_ID = 100, 300
MOST_ROUNDS = 10_000


def ids(count: int) -> list[int]:
    """Return token ids from a small range that every vocabulary has; speed does not depend on the ids."""
    return [FIRST_ID + (7919 * i + i * i) % (LAST_ID - FIRST_ID) for i in range(count)]


def resident_bytes(field: str) -> int:
    """Return this process's resident set (`VmRSS`) or its peak (`VmHWM`)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  (as plain as it goes)
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class _LlamaCpp:
    """A GGUF file in llama-cpp-python, with its adapter if there is one."""

    def __init__(self, job: dict[str, Any], context: int) -> None:
        import llama_cpp

        self.api, self.threads, self.batch = llama_cpp, job["threads"], BATCH
        llama_cpp.llama_backend_init()
        adapters = [path for path in job["files"] if path.endswith("adapter.gguf")]
        (path,) = (path for path in job["files"] if path.endswith(".gguf") and path not in adapters)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the file")
        # Before the context is created: its graphs reserve room for the adapters that the model has by then.
        loaded = [llama_cpp.llama_adapter_lora_init(self.model, one.encode()) for one in adapters]
        self.context = llama_cpp.llama_init_from_model(self.model, self._parameters(context))
        if not self.context or not all(loaded):
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        if loaded:
            self._apply(loaded)
        self.runtime = f"llama-cpp-python {version('llama-cpp-python')}"

    def _parameters(self, context: int) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        return parameters

    def _apply(self, loaded: list[Any]) -> None:
        import ctypes

        strengths = (ctypes.c_float * len(loaded))(*[1.0] * len(loaded))
        pointers = (self.api.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
        self.api.llama_set_adapters_lora(self.context, pointers, len(loaded), strengths)

    def describe(self) -> dict[str, Any]:
        import ctypes

        text = ctypes.create_string_buffer(128)
        self.api.llama_model_desc(self.model, text, len(text))
        parameters = int(self.api.llama_model_n_params(self.model))
        return {"model_type": text.value.decode(errors="replace"), "model_n_params": parameters}

    def logits(self, prompt: list[int]) -> Any:
        import numpy as np

        self.start(0)
        batch = self.api.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for i, token in enumerate(prompt):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        self._check(self.api.llama_decode(self.context, batch))
        width = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(len(prompt), width))

    def start(self, depth: int) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.read(ids(depth))

    def read(self, tokens: list[int]) -> None:
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            array = (self.api.llama_token * len(part))(*part)
            self._check(self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(part))))
        self.api.llama_synchronize(self.context)

    def generate(self, count: int) -> None:
        for token in ids(count):
            self.read([token])

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"llama.cpp failed to decode: status {status}")


class _OnnxRuntime:
    """A decoder in plain onnxruntime; keys and values stay in the runtime's own memory."""

    def __init__(self, job: dict[str, Any], context: int) -> None:
        import numpy as np
        import onnxruntime

        self.np, self.api, self.batch = np, onnxruntime, context
        with open(job["folder"] + "/genai_config.json", encoding="utf-8") as file:  # noqa: PTH123  (as plain as it goes)
            decoder = json.load(file)["model"]["decoder"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        options.log_severity_level = 3
        for name, value in decoder["session_options"].items():
            if "." in name:
                options.add_session_config_entry(name, value)
        path = job["folder"] + "/model.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.width = int(decoder["head_size"])
        self.runtime = f"onnxruntime {version('onnxruntime')}"
        self.start(0)

    def describe(self) -> dict[str, Any]:
        return {"model_type": None, "model_n_params": None}

    def logits(self, prompt: list[int]) -> Any:
        self.start(0)
        return self._run(prompt).numpy()[0]

    def start(self, depth: int) -> None:
        past = [one for name, one in self.inputs.items() if name.startswith("past_key_values.")]
        empty = {one.name: self.np.zeros((1, one.shape[1], 0, self.width), self.np.float32) for one in past}
        self.past = {name: self._value(array) for name, array in empty.items()}
        self.length = 0
        if depth:
            self.read(ids(depth))

    def read(self, tokens: list[int]) -> None:
        self._run(tokens)

    def generate(self, count: int) -> None:
        for token in ids(count):
            self._run([token])

    def _run(self, tokens: list[int]) -> Any:
        np, end = self.np, self.length + len(tokens)
        feeds = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, end), np.int64)}
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.arange(self.length, end, dtype=np.int64)[None]
        values = {name: self._value(array) for name, array in feeds.items()}
        presents = [name.replace("past_key_values", "present") for name in self.past]
        logits, *made = self.session.run_with_ort_values(["logits", *presents], {**values, **self.past})
        self.past, self.length = dict(zip(self.past, made)), end  # noqa: B905  (Python 3.8 knows no `strict`)
        return logits

    def _value(self, array: Any) -> Any:
        return self.api.OrtValue.ortvalue_from_numpy(array)


class _Genai:
    """The same decoder in onnxruntime-genai, for which a bundle's genai_config.json is made."""

    def __init__(self, job: dict[str, Any], context: int) -> None:
        import numpy as np
        import onnxruntime_genai

        self.np, self.api, self.batch = np, onnxruntime_genai, context
        config = onnxruntime_genai.Config(job["folder"])
        options = {"intra_op_num_threads": job["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.context = context
        self.runtime = f"onnxruntime-genai {version('onnxruntime-genai')}"

    def describe(self) -> dict[str, Any]:
        return {"model_type": None, "model_n_params": None}

    def start(self, depth: int) -> None:
        parameters = self.api.GeneratorParams(self.model)
        # Prevent an early end.
        parameters.set_search_options(max_length=self.context, min_length=self.context, do_sample=False)
        self.generator = self.api.Generator(self.model, parameters)
        if depth:
            self.read(ids(depth))

    def read(self, tokens: list[int]) -> None:
        self.generator.append_tokens(self.np.array([tokens], self.np.int32))

    def generate(self, count: int) -> None:
        for _ in range(count):
            self.generator.generate_next_token()


def runtime_of(job: dict[str, Any]) -> Any:
    """Return the class that times a job's model."""
    if job["target"] == "gguf":
        return _LlamaCpp
    return _Genai if importlib.util.find_spec(GENAI[0]) else _OnnxRuntime


def elapsed_ns(runtime: Any, prompt: int, generate: int, depth: int) -> int:
    """Return the nanoseconds of one test."""
    # Generation starts after a token that was read, so the context needs at least one.
    runtime.start(max(depth, 0 if prompt else 1))
    tokens = ids(prompt)
    started = time.perf_counter_ns()
    if prompt:
        runtime.read(tokens)
    else:
        runtime.generate(generate)
    return time.perf_counter_ns() - started


def timed(runtime: Any, prompt: int, generate: int, job: dict[str, Any]) -> dict[str, Any]:
    """Return the repeats of a test, after a warm-up."""
    depth = job["depth"]
    elapsed_ns(runtime, prompt, generate, depth)
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    samples = [elapsed_ns(runtime, prompt, generate, depth) for _ in range(job["repeats"])]
    return {"n_prompt": prompt, "n_gen": generate, "n_depth": depth, "test_time": begun, "samples_ns": samples}


def sustained(runtime: Any, job: dict[str, Any]) -> list[int]:
    """Return the nanoseconds of each round of generation until the requested seconds are over."""
    end = time.perf_counter() + job["sustain_s"]
    rounds: list[int] = []
    while job["sustain_s"] and time.perf_counter() < end and len(rounds) < MOST_ROUNDS:
        rounds.append(elapsed_ns(runtime, 0, job["generate"], job["depth"]))
    return rounds


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return all timings."""
    before, started = resident_bytes("VmRSS"), time.perf_counter_ns()
    runtime = runtime_of(job)(job, job["context"])
    load_ns = time.perf_counter_ns() - started
    tests = [timed(runtime, job["prompt"], 0, job), timed(runtime, 0, job["generate"], job)]
    peak = resident_bytes("VmHWM")
    return {
        "runtime": runtime.runtime, **runtime.describe(), "n_batch": runtime.batch, "n_threads": job["threads"],
        "load_ns": load_ns, "interpreter_bytes": before, "peak_bytes": peak, "tests": tests,
        "sustained_ns": sustained(runtime, job),
    }  # fmt: skip


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Return the top token and its logit at each position of the self-test."""
    prompt, positions = job["self_test"]["prompt"], job["self_test"]["positions"]
    kind = _LlamaCpp if job["target"] == "gguf" else _OnnxRuntime
    rows = kind(job, max(64, len(prompt))).logits(prompt)[positions]
    best = rows.argmax(axis=1)
    return {"tokens": best.tolist(), "logits": [float(row[token]) for row, token in zip(rows, best)]}  # noqa: B905


def needs(target: str) -> dict[str, Any]:
    """Return the packages that are missing for a target."""
    missing = [needed for needed in NEEDED[target] if not importlib.util.find_spec(needed[0])]
    # The folders in which it would look without isolation.
    folders = [site.getusersitepackages(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    hidden = [
        f"{package} in {one}" for module, package in missing for one in folders if PathFinder.find_spec(module, [one])
    ]
    return {
        "python": sys.version.split()[0], "missing": [package for _, package in missing], "hidden": hidden,
    }  # fmt: skip


def main(command: str, argument: str) -> dict[str, Any]:
    """Run a command of the command line."""
    if command == "needs":
        return needs(argument)
    with open(argument, encoding="utf-8") as file:  # noqa: PTH123  (as plain as it goes)
        job = json.load(file)
    # The requester may be gone.
    signal.alarm(job["limit_s"])
    return answers(job) if command == "selftest" else measure(job)


if __name__ == "__main__":
    # Runtimes print to standard output, which is kept for the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        result = main(sys.argv[1], sys.argv[2])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    with os.fdopen(answer, "w") as output:
        json.dump(result, output)
