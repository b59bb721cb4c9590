"""A limit to the memory of the process itself, for work on what may ask for all of it."""

import contextlib
import resource
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def memory_limited(more_bytes: int) -> Iterator[None]:
    """Let this process reserve no more than so many bytes beyond what it has, on systems that can limit that."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = psutil.Process().memory_info().vms + more_bytes
    lowest = min([wanted, *(limit for limit in before if limit != resource.RLIM_INFINITY)])
    # macOS knows this limit, but refuses to set it.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (lowest, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, before)
