"""Memory that is freed stays with the process: giving it back costs a CPU time at every large tensor.

glibc returns a large block, or the end of its heap, to the operating system when it is freed, and the next tensor has
to fetch it again: every page anew and filled with zeros. Networks free and allocate the same few megabytes thousands
of times a second. `benchmarks.throughput` keeps it, and with `--plain` does not.
"""

from __future__ import annotations

import ctypes
import os

KEPT = 2**30
"""Bytes of freed memory at the end of the heap that stay with the process."""
LARGEST_FROM_HEAP = 2**25
"""Bytes up to which a block is taken from the heap, where it can be kept; glibc allows no more."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(kept: int = KEPT) -> bool:
    """From now on up to `kept` freed bytes stay with this process; results do not change. For CPUs, with glibc.

    The setting is the whole process's, so programs choose it (the commands of this project do, when they run on a CPU)
    and `make` does not. An environment variable of glibc's allocator wins.

    Returns:
        whether it was taken: False with another C library, or where a variable decides.

    Raises:
        ValueError: a negative number.
    """
    if kept < 0:
        raise ValueError(f"kept={kept}: expected a number of bytes, at least 0")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    return bool(
        set_option(_M_TRIM_THRESHOLD, min(kept, 2**31 - 1)) and set_option(_M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
    )
