"""llama.cpp's own quantiser; run it in a child process, since it may abort."""

import ctypes
from pathlib import Path

import llama_cpp

from exporter.formats.format import Float32


def quantise(source: Path, target: Path, mix: str, importance: dict[str, Float32]) -> tuple[int, str]:
    """Run `llama_model_quantize` in this process and return its status and the last error it logged."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _, text, __: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    parameters = quantise_parameters(mix, importance)
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    errors = [line.strip() for line in lines if "fail" in line or "error" in line]
    return status, errors[-1] if errors else ""


def quantise_parameters(mix: str, importance: dict[str, Float32]) -> llama_cpp.llama_model_quantize_params:
    """Return the quantiser's parameters for a mix and importance, GGUF name -> float32 [columns]."""
    parameters: llama_cpp.llama_model_quantize_params = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if mix == 'F32' else 'MOSTLY'}_{mix}")
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    return parameters
