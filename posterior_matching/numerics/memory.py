"""Memory allocation in this process."""

import contextlib
import ctypes
import gc
import pathlib
import sys
from collections.abc import Iterator

import jax

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation (does nothing except on Linux with glibc).

    On CPUs XLA allocates new buffers for every training step. By default glibc gets blocks of this size from the kernel
    each time and returns them afterwards, and the kernel fills every page with zeros, which takes a fifth of the time
    of a step of `configs/pm_vae_gas.py` and two fifths of one of `configs/pm_vdvae_mnist.py`.

    JAX's programs for CPUs then run in the thread that calls them, and a call returns when its program has ended.
    """
    if not sys.platform.startswith("linux"):
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


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Python does not look for garbage within this context.

    Tracing a deep model makes hundreds of thousands of objects that stay, and Python would look through them again and
    again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def forget_programs_near_the_limit(share: float = 0.5) -> None:
    """Drops all compiled programs if the process has this share of the memory maps that Linux allows it.

    XLA's programs for CPUs have maps of their own, and JAX keeps the programs. A process that compiles without end, as
    one that fits a hundred models does, would crash at the limit.
    """
    try:
        allowed = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as maps:
            used = sum(1 for _ in maps)
    except (OSError, ValueError):
        return
    if used > share * allowed:
        jax.clear_caches()
        gc.collect()
