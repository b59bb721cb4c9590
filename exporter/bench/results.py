"""The answers of a measuring program, checked strictly because they come from another machine."""

from statistics import median
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import Document

# The longest answer has 30,000 timings. The parser takes seconds over a million characters of empty lists.
MAX_CHARACTERS = 1 << 20
MAX_VALUES = 1 << 16
MAX_TOKENS = 1 << 20
Name = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Place = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Size = Annotated[int, Field(ge=0, le=1 << 46)]
# From a microsecond to a day.
Nanoseconds = Annotated[int, Field(ge=1_000, le=86_400_000_000_000)]
Time = Annotated[str, Field(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$")]
# Only the first of a million errors is reported: a list of all would take gigabytes.
Samples = Annotated[tuple[Nanoseconds, ...], Field(min_length=1, max_length=10_000, fail_fast=True)]
# A product of a small matrix takes less than a microsecond on a fast processor.
ProductSamples = Annotated[
    tuple[Annotated[int, Field(ge=1, le=86_400_000_000_000)], ...], Field(min_length=1, max_length=1000, fail_fast=True)
]
Result = TypeVar("Result")


class Test(Document):
    """One test, named as in llama-bench: `n_prompt` tokens read at once, or `n_gen` generated one at a time.

    Attributes:
        n_depth: Tokens already in the context.
        test_time: Start time, UTC.
        samples_ns: Time of each repeat, after a warm-up.
    """

    n_prompt: Tokens
    n_gen: Tokens
    n_depth: Tokens
    test_time: Time
    samples_ns: Samples

    @property
    def name(self) -> str:
        """`pp512`, `tg128`, or `tg128 @ d4096`."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [1e9 * (self.n_prompt + self.n_gen) / sample for sample in self.samples_ns]

    @property
    def tokens_per_s(self) -> float:
        """Median over the repeats."""
        return median(self.samples_ts)


class Measurement(Document):
    """The timings of a machine.

    Attributes:
        runtime: Package or program and its version.
        model_type: The runtime's own description of the model; None if it has none.
        model_n_params: Number of weights, as the runtime counts them.
        n_batch: Most tokens read at once.
        n_threads: Threads.
        load_ns: Time to load the model; None if it was not timed.
        interpreter_bytes: Resident set before the model was loaded; None if it was not read.
        peak_bytes: Peak resident set of the tests.
        tests: The tests of prefill and of decoding.
        sustained_ns: Times of consecutive rounds of generation, each with as many tokens as the test generates.
    """

    runtime: Name
    model_type: Name | None
    model_n_params: Annotated[int, Field(ge=0, le=1 << 50)] | None
    n_batch: Tokens
    n_threads: Annotated[int, Field(ge=1, le=1024)]
    load_ns: Nanoseconds | None
    interpreter_bytes: Size | None
    peak_bytes: Size | None
    tests: Annotated[tuple[Test, ...], Field(min_length=2, max_length=2, fail_fast=True)]
    sustained_ns: Annotated[tuple[Nanoseconds, ...], Field(max_length=10_000, fail_fast=True)]

    @property
    def prefill(self) -> Test:
        """The test of prefill."""
        return self.tests[0]

    @property
    def decode(self) -> Test:
        """The test of decoding."""
        return self.tests[1]

    @property
    def sustained_ts(self) -> list[float]:
        """Tokens per second of each sustained round."""
        return [1e9 * self.decode.n_gen / sample for sample in self.sustained_ns]


class ProductTimes(Document):
    """The times of one product, in turns with the product of the same shape in another format.

    Attributes:
        type: Format of the matrix.
        rows: Its rows.
        columns: Its columns.
        tokens: Vectors that it is multiplied with.
        row_bytes: Bytes of a row.
        reference_ns: Times of the other format.
        ns: Times of this one, as many.
    """

    type: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,32}$")]
    rows: Annotated[int, Field(ge=1, le=1 << 20)]
    columns: Annotated[int, Field(ge=1, le=1 << 20)]
    tokens: Annotated[int, Field(ge=1, le=1 << 16)]
    row_bytes: Annotated[int, Field(ge=1, le=1 << 24)]
    reference_ns: ProductSamples
    ns: ProductSamples

    @model_validator(mode="after")
    def _takes_turns(self) -> Self:
        if len(self.ns) != len(self.reference_ns):
            raise ValueError("ns and reference_ns are not as many")
        return self

    @property
    def weights(self) -> int:
        """Weights of the matrix."""
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and tokens."""
        return self.rows, self.columns, self.tokens


class KernelTimes(Document):
    """The times of a runtime's kernels."""

    threads: Annotated[int, Field(ge=1, le=256)]
    time: Time
    products: Annotated[tuple[ProductTimes, ...], Field(min_length=1, max_length=500, fail_fast=True)]


class Needs(Document):
    """The packages that a device's Python lacks.

    Attributes:
        python: Version of Python.
        missing: The missing packages, by pip's names.
        hidden: Those of them that a Python without isolation finds, with the folder of each.
    """

    python: Name
    missing: Annotated[tuple[Name, ...], Field(max_length=10, fail_fast=True)]
    hidden: Annotated[tuple[Place, ...], Field(max_length=100, fail_fast=True)]


class Answers(Document):
    """The top token and its logit at each position of a self-test."""

    tokens: Annotated[tuple[Tokens, ...], Field(max_length=1000, fail_fast=True)]
    logits: Annotated[tuple[float, ...], Field(max_length=1000, fail_fast=True)]


class LlamaBenchRow(BaseModel):
    """A row of `llama-bench -o json`. Other versions have further fields, which are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    build_commit: Name
    build_number: Annotated[int, Field(ge=0, le=1 << 31)]
    model_type: Name
    model_n_params: Annotated[int, Field(ge=0, le=1 << 50)]
    n_batch: Tokens
    n_threads: Annotated[int, Field(ge=1, le=1024)]
    n_prompt: Tokens
    n_gen: Tokens
    n_depth: Tokens = 0
    test_time: Time
    samples_ns: Samples

    @property
    def test(self) -> Test:
        """The row as a test."""
        return Test(
            n_prompt=self.n_prompt, n_gen=self.n_gen, n_depth=self.n_depth, test_time=self.test_time,
            samples_ns=self.samples_ns,
        )  # fmt: skip


# Rows of one test, or of both.
LlamaBenchRows = Annotated[tuple[LlamaBenchRow, ...], Field(max_length=2, fail_fast=True)]


def parsed(kind: type[Result], text: str, where: str) -> Result:
    """Parse a device's answer as a document.

    Raises:
        InputError: it is no such document.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            "the device's answer is too long for the measuring program's", where=where, got=f"{len(text):,} characters",
            expected=f"at most {MAX_CHARACTERS:,}", next_step="check what runs there under that name",
        )  # fmt: skip
    if text.count(",") >= MAX_VALUES:
        raise InputError(
            "the device's answer has more values than the measuring program's", where=where,
            got=f"{text.count(','):,} commas", expected=f"less than {MAX_VALUES:,}",
            next_step="check what runs there under that name",
        )  # fmt: skip
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, fault["loc"])) or "the text"
        raise InputError(
            "the device's answer is not one of the measuring program's", where=where,
            got=f"{shown(key)}: {fault['msg']}", next_step="check what runs there under that name",
        ) from error  # fmt: skip
