"""bfloat16 matrix products where reduced precision is enough."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# torch's names for instruction sets that multiply bfloat16.
TILES, VECTORS = "amx_bf16", "avx512_bf16"


@contextmanager
def quick_products() -> Iterator[None]:
    """Let torch multiply in bfloat16 and accumulate in float32, if the processor has instructions for it.

    Rounding errors are random and at most 1/256 of a value; quantising weights causes about ten times that. On two
    server cores, matrix products took 0.2 to 0.4 of float32's time with `TILES`, and 0.4 to 0.6 with only `VECTORS`.
    With `VECTORS`, results are also rounded. Products added in place, such as second moments, then stay float32, since
    rounded moments need not be positive definite. Other processors multiply in float32.
    """
    able = torch.cpu.get_capabilities()
    if able.get(TILES):
        with _precision("bf16"):
            yield
    elif able.get(VECTORS):
        with _Rounded():  # type: ignore[no-untyped-call]
            yield
    else:
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Let torch multiply in full precision, for token positions: bfloat16 cannot represent odd numbers above 256.

    With `TILES`, every matrix product is otherwise rounded; with `VECTORS`, only those with a layer's or the head's
    weights.
    """
    with _precision("ieee"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    # torch adds this attribute at import, so type checkers do not see it.
    products = cast(Any, torch.backends.mkldnn).matmul
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the inputs and results of float32 matrix products to bfloat16."""

    # A layer's matrix product arrives as `linear` without autograd, and as its component operations with it.
    products = (torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.products or any(one.dtype != torch.float32 for one in args):
            return func(*args, **kwargs)
        return func(*(one.bfloat16() for one in args), **kwargs).float()
