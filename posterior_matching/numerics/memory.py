"""Memory allocation in the process of a script on CPUs."""

import ctypes
import importlib.util
import sys
from importlib import metadata

import jax

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation, on Linux hosts without JAX plugins for accelerators.

    On CPUs XLA allocates new buffers for every training step. By default glibc gets blocks of this size from the kernel
    each time and returns them afterwards, and the kernel fills every page with zeros, which takes a fifth of the time
    of a step of `configs/pm_vae_gas.py` and two fifths of one of `configs/pm_vdvae_mnist.py`.

    JAX's programs for CPUs then run in the thread that calls them, and a call returns when its program has ended.
    """
    accelerators = metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    if accelerators or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never; 2**31 - 1, the largest int, is less than what deep models allocate
    # Only the main thread keeps blocks of more than 64 MB, so it has to run the programs. Were all threads to share its
    # memory (M_ARENA_MAX), the pieces that compiling leaves there would slow down every small product (docs/notes.md).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
