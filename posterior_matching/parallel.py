"""Data parallelism by pmap: one program on every local device of every process, with batches split along `AXIS`."""

import functools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from posterior_matching.errors import UserError, first_line

AXIS = "batch"
Tree = TypeVar("Tree")
_holds_service = False  # whether this is process 0 of several, without whose service the others abort


def initialize(coordinator_address: str, num_processes: int, process_id: int, seconds: int = 120) -> None:
    """Joins this process to a run over several processes; call it before any other use of JAX.

    JAX ends a process that waits longer than `seconds` for the others, or that has lost one of them.

    Args:
        coordinator_address: `host:port` of process 0, reachable from all.
        num_processes: The number of processes.
        process_id: The index of this one, from 0.
        seconds: How long to wait for the others.

    Raises:
        UserError: Process 0 cannot be reached, or its address cannot be used.
    """
    try:
        if process_id:  # JAX would abort with a stack trace
            _wait_for_process_0(coordinator_address, seconds)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=20,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"cannot join the other processes at '{coordinator_address}' ({first_line(error)[:200]}): start "
            "--num_processes processes with different --process_id and the same --coordinator_address, host:port"
        ) from error
    global _holds_service
    _holds_service = process_id == 0


def _wait_for_process_0(address: str, seconds: int) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=seconds).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def is_lost_contact(error: Exception) -> bool:
    """Whether JAX raised the error in a collective operation in which another process was missing."""
    if not jax.distributed.is_initialized():
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or re.search("Gloo|NCCL", str(error)) is not None


def exit_at_once(status: int = 1) -> NoReturn:
    """Ends this process; if it has joined others, without JAX's wait for them to end, too: they end for lack of it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        time.sleep(3 * _holds_service)  # for the others to say why they end
        os._exit(status)
    sys.exit(status)


def check_agreement(values: Mapping[str, Any]) -> None:
    """Compares values, by name, with those of the other processes; all processes must call this.

    Raises:
        UserError: Two processes differ; all raise the same.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(values, default=str).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(text)))
    texts = process_allgather(np.pad(text, (0, sizes.max() - len(text))))  # [processes, bytes]
    first, *others = (json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True))
    for number, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"{name} is {first.get(name)} in process 0, but {other.get(name)} in process {number}: start all "
                    "processes with the same flags"
                )


def pmap(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.pmap` over `AXIS`: array arguments and results have a leading axis of local devices."""
    return jax.pmap(fn, axis_name=AXIS, **options)


def replicate(tree: Tree) -> Tree:
    """Copies a pytree of arrays to every local device; leaves gain a leading axis of local devices."""
    return _copy()(np.arange(jax.local_device_count()), tree)


@functools.cache
def _copy() -> Callable[[np.ndarray, Any], Any]:
    return pmap(lambda _, tree: tree, in_axes=(0, None))


def unreplicate(tree: Any) -> Any:
    """Returns the first local device's copy, as NumPy arrays that own their memory."""
    return jax.tree.map(lambda a: np.array(a.addressable_data(0))[0], tree)


def shard(tree: Tree) -> Tree:
    """Moves arrays with leading axis [local devices] to the devices."""
    return _identity()(tree)


@functools.cache
def _identity() -> Callable[[Any], Any]:
    return pmap(lambda tree: tree)  # one pmap for all calls, as each compiles separately


def local_devices() -> range:
    """Global indices of this process's devices, as `jax.lax.axis_index(AXIS)` counts them."""
    first = jax.process_index() * jax.local_device_count()
    return range(first, first + jax.local_device_count())


def any_process(flag: bool) -> bool:
    """Returns whether `flag` holds on any process; all processes must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(unreplicate(_any_process()(np.full(jax.local_device_count(), flag, np.int32))))


@functools.cache
def _any_process() -> Callable[[np.ndarray], jax.Array]:
    return pmap(lambda flags: jax.lax.pmax(flags, AXIS))


def wait_for_all_processes() -> None:
    """Returns once all processes have called this."""
    any_process(False)
