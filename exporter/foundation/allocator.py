"""Controls how glibc's allocator treats freed memory."""

import ctypes

# Option numbers of glibc, the largest block allocated from the heap, and the free memory kept at the heap's end until
# `give_back_freed_memory`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
FROM_HEAP_UP_TO_BYTES, FREE_AT_END_BYTES = 32 << 20, 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep freed memory until `give_back_freed_memory`, since activations reuse the same blocks.

    Mapping a block again costs a page fault per page: a third of the time of a layer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, FROM_HEAP_UP_TO_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, FREE_AT_END_BYTES)


def give_back_freed_memory() -> None:
    """Let glibc return all free pages of the heap to the system.

    Otherwise blocks that outlive a layer leave holes between them, a gigabyte for a model of that many weights.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
