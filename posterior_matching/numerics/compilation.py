"""Compilation in this process."""

import contextlib
import gc
import os
import pathlib
from collections.abc import Iterator

import jax

_OPTIONS = ("xla_cpu_disable_loop_unrolling", "xla_cpu_disable_slp_vectorizer")


def compile_without_unrolling() -> None:
    """Makes XLA compile for CPUs without LLVM's unrolling of loops, and without SLP vectorisation after it.

    For training: compiling takes a quarter less time, and steps are as fast (docs/notes.md). Products with single rows,
    as in some evaluations, would be slower. To be called before JAX's backend starts. Sets XLA_FLAGS; options that the
    user gives there come last, and win.
    """
    flag = "--xla_backend_extra_options=" + ",".join(_OPTIONS)
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([flag, *(option for option in given if option != flag)])


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
