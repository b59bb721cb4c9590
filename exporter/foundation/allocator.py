"""What glibc's allocator does with memory that is freed."""

import ctypes

# glibc's numbers of its options, the largest block that it takes from the heap at all, and what may stay free at the
# heap's end until `give_back_freed_memory`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
FROM_HEAP_UP_TO_BYTES, FREE_AT_END_BYTES = 32 << 20, 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed until `give_back_freed_memory`: activations are the same blocks again and again.

    A block that it maps anew costs a page fault for each of its pages: a third of the time of a layer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, FROM_HEAP_UP_TO_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, FREE_AT_END_BYTES)


def give_back_freed_memory() -> None:
    """Let glibc return all free pages to the system, wherever in the heap they are.

    What outlives a layer would leave holes between what does not, a gigabyte of them for a model of that many weights.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
