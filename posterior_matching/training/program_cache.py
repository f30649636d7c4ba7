"""Compiled programs on disk: a script whose program is that of an earlier run starts without tracing it.

JAX's compilation cache finds a program by its lowered text, so Python has to trace it first, which takes seconds for
deep models. Here it is also found by all that determines the text: the files of the loaded code, what the program
computes, and the shapes of its arguments. Only on CPUs; elsewhere, JAX's cache serves.
"""

import contextlib
import hashlib
import os
import pathlib
import pickle
import platform
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from posterior_matching.atomic import replacing, write_text
from posterior_matching.numerics import on_cpu
from posterior_matching.numerics.compilation import without_garbage_collection

_PACKAGE = pathlib.Path(__file__).parents[1]
_folder: pathlib.Path | None = None
_code: list[Any] | None = None  # the loaded files and their states; None: not known
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


def keep_programs_in(folder: pathlib.Path | None) -> None:
    """Keeps compiled programs in this folder from now on; None: nowhere, the default.

    For scripts, which call it once their imports are done: code that is changed later is not noticed. Programs are
    machine code, within pickles, so nobody else should be able to write there.
    """
    global _folder, _code
    _folder, _code = folder, None
    if hasattr(sys.modules["__main__"], "__file__"):  # else code has been typed in
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        _code = [(file, _state(file)) for file in sorted(files | {str(path) for path in _PACKAGE.rglob("*.py")})]


class CachedFunction:
    """A pmapped function whose compiled programs are kept on disk.

    Args:
        fn: The function.
        program: What it computes, besides code: with equal pickles, equal functions compute the same.
    """

    def __init__(self, fn: Callable[..., Any], program: object):
        self.fn, self._program = fn, program
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        if not _keeps():
            return self.fn(*args)
        return self.compiled(*args)(*args)

    def compiled(self, *args: Any) -> jax.stages.Compiled:
        """The program for arguments of these shapes: from memory, from disk, or compiled."""
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *((a.shape, a.dtype) for a in leaves))
        if shapes not in self._compiled:
            self._compiled[shapes] = self._find(args, shapes)
        return self._compiled[shapes]

    def _find(self, args: tuple[Any, ...], shapes: tuple[Any, ...]) -> jax.stages.Compiled:
        fn: Any = self.fn
        if not _keeps():
            return _lower(fn, args).compile()
        assert _folder is not None
        description = _description(fn.__name__, self._program, shapes)
        known_as = None if description is None else _folder / f"{_digest(description)}.txt"
        name = None if known_as is None else _read_text(known_as)
        program = None if name is None else _load(_folder / name)
        if program is None:
            lowered = _lower(fn, args)
            path = _folder / _digest(repr(_surroundings()).encode() + lowered.as_text().encode())
            program = _load(path)
            if program is None:
                with _without_the_cache_of_jax():  # what is loaded from it cannot be stored again
                    program = lowered.compile()
                _store(program, path)
            if known_as is not None:
                _ignoring_problems(lambda: write_text(known_as, path.name))
        return program


def _lower(fn: Any, args: tuple[Any, ...]) -> jax.stages.Lowered:
    with without_garbage_collection():
        return fn.lower(*args)


def _keeps() -> bool:
    return _folder is not None and on_cpu() and jax.process_count() == 1


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _description(name: str, program: object, shapes: tuple[Any, ...]) -> bytes | None:
    """All that determines the lowered text; None if that is not known, as for a program that has no pickle."""
    if _code is None:
        return None
    try:
        pickled = pickle.dumps(program)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return repr([name, _code, [str(shape) for shape in shapes], _surroundings()]).encode() + pickled


def _state(file: str) -> Any:
    """What a source file contains; of installed packages, which are large, when it changed and its size."""
    try:
        if file.endswith(".py") and not file.startswith(_INSTALLED):
            return _digest(pathlib.Path(file).read_bytes())
        status = os.stat(file)
        return status.st_mtime_ns, status.st_size
    except OSError:  # built in, or within an archive
        return None


def _surroundings() -> list[Any]:
    """All that determines the compiled program, besides the lowered text."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_")))
    options = sorted((name, str(value)) for name, value in jax.config.values.items())
    devices = [(device.device_kind, device.client.platform_version) for device in jax.devices()]
    return [jax.__version__, variables, options, devices, platform.machine(), _cpu_features()]


def _cpu_features() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@contextlib.contextmanager
def _without_the_cache_of_jax() -> Iterator[None]:
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at the option once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _read_text(path: pathlib.Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _load(path: pathlib.Path) -> jax.stages.Compiled | None:
    """The program in a file; None if it is not there, damaged, or not for this machine."""
    try:
        content = zlib.decompress(path.read_bytes())  # compares a checksum
        return serialize_executable.deserialize_and_load(*pickle.loads(content))
    except Exception as error:  # what XLA raises has no common class
        logging.info("compiling anew: %s", error)
        return None


def _store(program: jax.stages.Compiled, path: pathlib.Path) -> None:
    def write() -> None:
        content = pickle.dumps(serialize_executable.serialize(program))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(zlib.compress(content, level=1))  # a fifth of the size in 60 ms

    _ignoring_problems(write)


def _ignoring_problems(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:  # a full disk, or a program that cannot be serialised: slower next time
        logging.warning("not storing a compiled program: %s", error)
