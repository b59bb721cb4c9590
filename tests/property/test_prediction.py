"""Predictions of any file on any device are ordered, finite, and slower for a larger file."""

from dataclasses import replace
from math import isfinite

from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.device.profile import device_names, load_device
from exporter.predict.rates import rates
from exporter.predict.request import Request
from tests.predicting import predict

FORMATS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ3_XXS", "int4", "w4a16")


@st.composite
def requests(draw: st.DrawFn) -> Request:
    parameters = draw(st.integers(1_000_000, 1_000_000_000_000))
    bits = draw(st.floats(1.5, 16))
    context = draw(st.integers(1, 1 << 20))
    return Request(
        file_bytes=max(1 << 20, round(parameters * bits / 8)),
        parameters=max(parameters, round((1 << 20) * 8 / 39)),
        format=draw(st.sampled_from(FORMATS)),
        backend=draw(st.sampled_from(["cpu", "gpu:vulkan", "gpu:metal", "gpu:opencl", "gpu:cuda", "npu:htp"])),
        context=context,
        prompt=draw(st.integers(1, context)),
        runtime=draw(st.sampled_from(["", "llama.cpp", "Ollama", "something new"])),
    )


@settings(max_examples=40, deadline=None)
@given(requests(), st.sampled_from(device_names()))
def test_predictions_are_ordered_and_finite(request: Request, name: str) -> None:
    profile = load_device(name)
    made = predict(profile, request)
    for one in (
        made.decode_tokens_per_s, made.prefill_tokens_per_s, made.time_to_first_token_ms, made.peak_bytes, made.load_ms,
    ):  # fmt: skip
        assert 0 < one.low <= one.value <= one.high and isfinite(one.high)
    if 16 * request.file_bytes < 40 * request.parameters and request.file_bytes > 1 << 27:
        short = replace(request, context=64, prompt=64)
        larger = rates(profile, replace(short, file_bytes=2 * request.file_bytes)).decode
        assert larger.value < rates(profile, short).decode.value
