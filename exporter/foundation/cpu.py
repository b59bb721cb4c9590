"""The number of usable CPU cores."""

import os
import sys


def available_cores() -> int:
    """Return the number of cores this process may use; a container or `taskset` may restrict it."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
