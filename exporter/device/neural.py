"""Facts about a device's neural processor that a compiler for it needs.

Compilers name an SoC by a number that its vendor does not publish in one place, and sources disagree. A profile keeps
every number that was found with its source, and uses the first.
"""

from typing import Literal

from pydantic import Field

from exporter.device.provenance import Text
from exporter.foundation.config_files import impossible
from exporter.foundation.quantities import Document

Architecture = Literal["v66", "v68", "v69", "v73", "v75", "v79", "v81"]
# Number -> SoCs and architecture, by ExecuTorch's qc_schema.py (Qualcomm's own contribution), which takes the numbers
# from the headers of Qualcomm's SDK; 35, 60, 68, 85 and 88 from code that uses these headers. onnxruntime-qnn 2.7.0
# compiles for all of them.
SOCS: dict[int, tuple[tuple[str, ...], Architecture]] = {
    30: (("SM8350",), "v68"),
    35: (("SM7325",), "v68"),
    36: (("SM8450",), "v69"),
    42: (("SM8475",), "v69"),
    43: (("SM8550",), "v73"),
    57: (("SM8650",), "v75"),
    60: (("SC8380XP",), "v73"),
    68: (("SM8635",), "v73"),
    69: (("SM8750",), "v79"),
    85: (("SM8735",), "v79"),
    87: (("SM8850", "SC8480XP"), "v81"),
    88: (("SC8480XP",), "v81"),
}


class SocNumber(Document):
    """A number by which compilers name an SoC, and where it was found."""

    value: int = Field(ge=1, le=1 << 16)
    source: Text


class NeuralProcessor(Document):
    """A neural processor as its compiler names it.

    Attributes:
        vendor: Who makes it.
        soc: Part number of the SoC, such as `SM8650`.
        architecture: Version of the processor, such as `v75`.
        source: Where the two were found.
        soc_numbers: The SoC's numbers that were found; the first is used. Empty if none was found.
    """

    vendor: Literal["Qualcomm"]
    soc: Text
    architecture: Architecture
    source: Text
    soc_numbers: tuple[SocNumber, ...] = Field(default=(), strict=False, max_length=8)

    @property
    def soc_number(self) -> int | None:
        """The number to compile for."""
        return self.soc_numbers[0].value if self.soc_numbers else None

    def require_known(self) -> None:
        """Refuse a number that the compiler does not know, or that is another SoC's.

        Raises:
            PydanticCustomError: it is.
        """
        number = self.soc_number
        if number is None:
            return
        if number not in SOCS:
            known = ", ".join(f"{one} ({' or '.join(names)})" for one, (names, _) in SOCS.items())
            raise impossible("the compiler knows no SoC of this number", number, known)
        names, architecture = SOCS[number]
        if self.soc not in names or self.architecture != architecture:
            raise impossible(
                f"soc_numbers contradicts the SoC: {number} is another",
                f"{self.soc} ({self.architecture})",
                f"{' or '.join(names)} ({architecture})",
            )
