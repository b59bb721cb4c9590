"""How ONNX Runtime rounds activations on a device: the accuracy level of the graph and the options of its session.

At level 4 `MatMulNBits` rounds activations to int8 in the weights' own blocks. A core without a kernel for that (Arm
without dotprod) computes in float32, for which only 4 bits have a fast kernel. On Arm with dotprod, 4-bit weights in
blocks of 32 or more without zero points use KleidiAI's kernels instead, which round activations by whole rows and
truncate scales to bfloat16. On an emulated Cortex-A76 these cost a mean KL of 0.046 against the same weights in
float32; ONNX Runtime's own int8 kernels cost 0.009, as on x86. KleidiAI is therefore disabled there. Level 1 takes
three times as long for a token at 4 bits and a hundred times at 8 (on x86; `exporter.targets.onnx.kernel_speeds`).
"""

from dataclasses import dataclass, field

from exporter.device.profile import DeviceProfile

DISABLE_KLEIDIAI = "mlas.disable_kleidiai"


@dataclass(frozen=True)
class Rounding:
    """The rounding on a device; two are equal if the runtime would do the same.

    Attributes:
        level: The attribute `accuracy_level` of every `MatMulNBits`.
        quick_bits: Code widths for which the device has fast kernels.
        options: Entries of the session's configuration, for genai_config.json.
        reason: Explanation for the plan and the report.
    """

    level: int = 4
    quick_bits: tuple[int, ...] = field(default=(2, 4, 8), compare=False)
    options: tuple[tuple[str, str], ...] = ()
    reason: str = field(default="activations in int8 blocks (accuracy level 4)", compare=False)


INT8_BLOCKS = Rounding()
KLEIDIAI = Rounding(reason="activations in int8 rows by KleidiAI (accuracy level 4)")
WITHOUT_KLEIDIAI = Rounding(
    options=((DISABLE_KLEIDIAI, "1"),),
    reason=f"{INT8_BLOCKS.reason}, without KleidiAI, which rounds more coarsely on Arm with dotprod",
)
FLOAT32 = Rounding(level=1, quick_bits=(4,), reason="activations in float32 (accuracy level 1)")


def rounding_on(device: DeviceProfile) -> Rounding:
    """Return the rounding for a device's instruction set."""
    features = device.isa.features
    if "dotprod" in features:
        return WITHOUT_KLEIDIAI
    if "neon" in features:
        return Rounding(quick_bits=(4,), reason="activations in float32: Arm without dotprod has no int8 kernels")
    return INT8_BLOCKS
