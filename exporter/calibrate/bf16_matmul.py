"""Products of float32 matrices in less time, where what they are for needs no more than some digits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A processor's instructions that multiply bfloat16, by torch's names for them.
TILES, VECTORS = "amx_bf16", "avx512_bf16"


@contextmanager
def quick_products() -> Iterator[None]:
    """Let torch round what it multiplies to bfloat16, and sum in float32, where the processor has instructions for it.

    Rounding is off by at most 1/256 of a value, and by chance: what formats do to weights is some ten times that. On
    two cores of servers products took 0.2 to 0.4 of float32's time with `TILES`, and 0.4 to 0.6 with `VECTORS` alone.
    There what comes out is rounded, too, and what is added up in place, as second moments are, stays float32: rounded
    ones need not be positive definite. Other processors multiply float32.
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
    """Keep torch from rounding positions of tokens, of which bfloat16 has no odd one past 256.

    With `TILES` every product is quick; with `VECTORS` only those with a layer's or the head's weights are.
    """
    with _precision("ieee"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    # torch adds this attribute while it is imported, out of sight of types.
    products = cast(Any, torch.backends.mkldnn).matmul
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds what float32 matrices are multiplied from and into."""

    # Where nothing can be derived a layer's product comes as `linear`, else as what it and its derivative consist of.
    products = (torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.products or any(one.dtype != torch.float32 for one in args):
            return func(*args, **kwargs)
        return func(*(one.bfloat16() for one in args), **kwargs).float()
