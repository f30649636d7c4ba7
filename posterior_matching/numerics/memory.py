"""Memory allocation in this process."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation (does nothing except on Linux with glibc).

    On CPUs XLA allocates new buffers for every training step. By default glibc gets blocks of this size from the kernel
    each time and returns them afterwards, and the kernel fills every page with zeros, which takes a fifth of the time
    of a step of `configs/pm_vae_gas.py`.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_ARENA_MAX, 1)
