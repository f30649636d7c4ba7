"""Data parallelism by pmap: one program on every local device of every process, with batches split along `AXIS`.

The processes of a run on several hosts tell each other why they end, so that each ends with one line.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its key-value store, which all processes share, has no public interface

from posterior_matching.errors import UserError

AXIS = "batch"
Tree = TypeVar("Tree")

_AGREE_SECONDS = 600  # the time that one process may need longer than another to load its data
_HEARTBEAT_SECONDS = 20  # without a sign of life, after which a process counts as lost
_GRACE_SECONDS = 3  # for a process to end by itself once another has failed
_FAILURE = "posterior_matching/failure"
_calls = itertools.count()
_leaving = threading.Event()  # set once this process ends by itself


def initialize(coordinator_address: str, num_processes: int, process_id: int, seconds: int = 120) -> None:
    """Joins this process to a run over several processes; call it before any other use of JAX.

    Args:
        coordinator_address: `host:port` of process 0, reachable from all.
        num_processes: The number of processes.
        process_id: The index of this one, from 0.
        seconds: How long to wait for the others.

    Raises:
        UserError: The others cannot be reached, or do not join in time.
    """
    _translate_fatal_errors()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(_cannot_join(str(error))) from error
    watch = threading.Thread(target=_end_when_another_fails, daemon=True)
    watch.start()
    atexit.register(watch.join)  # called in the reverse order, before JAX leaves the others
    atexit.register(_leaving.set)


def has_joined() -> bool:
    """Whether `initialize` has succeeded."""
    return distributed.global_state.client is not None


def is_lost_contact(error: Exception) -> bool:
    """Whether JAX raised the error in a collective operation in which another process was missing."""
    if not has_joined():
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or re.search("Gloo|NCCL", str(error)) is not None


def check_agreement(values: Mapping[str, Any]) -> None:
    """Compares values, by name, with those of the other processes; all processes must call this.

    Raises:
        UserError: Two processes differ.
    """
    if jax.process_count() == 1:
        return
    store: Any = distributed.global_state.client
    here, call = jax.process_index(), next(_calls)
    store.key_value_set(f"posterior_matching/values/{call}/{here}", json.dumps(values, default=str))
    mine = json.loads(json.dumps(values, default=str))
    for other in range(jax.process_count()):
        theirs = store.blocking_key_value_get(f"posterior_matching/values/{call}/{other}", _AGREE_SECONDS * 1000)
        theirs = json.loads(theirs)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{name} is {mine.get(name)} in process {here}, but {theirs.get(name)} in process {other}: start "
                    "all processes with the same flags"
                )


def exit_with_others(message: str) -> None:
    """Ends this process with status 1 and tells the others why; returns if it has not joined any."""
    if (store := distributed.global_state.client) is None:
        return
    _leaving.set()
    with contextlib.suppress(Exception):  # another has failed before
        store.key_value_set(_FAILURE, f"process {distributed.global_state.process_id} failed: {message}")
        if distributed.global_state.process_id == 0:  # it holds the store
            time.sleep(2 * _GRACE_SECONDS)
    sys.stdout.flush()
    os._exit(1)  # without waiting for the others to end, too


def wait_for_the_reason() -> None:
    """Waits until this process is ended, with one line, because another has failed or is lost; or long enough."""
    time.sleep(2 * (_HEARTBEAT_SECONDS + _GRACE_SECONDS))


def _end_when_another_fails() -> None:
    """Ends this process with one line soon after another has failed."""
    store: Any = distributed.global_state.client
    while not _leaving.wait(1):
        try:
            failure = store.key_value_try_get(_FAILURE)
        except Exception:  # none has, or process 0 is lost, which ends this one
            continue
        if not _leaving.wait(_GRACE_SECONDS):
            print(f"error: {failure}", file=sys.stderr, flush=True)
            os._exit(1)


def _translate_fatal_errors() -> None:
    """Replaces the C++ stack trace with which JAX ends a process that has lost another by one line.

    What libraries write to stderr goes through a small process that passes it on, up to the first message of the
    coordination service, and reports what that means when this process has ended.
    """
    if not hasattr(os, "fork"):
        return
    read, write = os.pipe()
    stderr = os.dup(2)
    if os.fork() == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.close(write)
        held = ""
        with os.fdopen(read, errors="replace") as lines:
            for line in lines:
                if held or _OF_THE_COORDINATION.search(line):
                    held += line
                else:
                    os.write(stderr, line.encode())
        if held:
            fatal = "Terminating process because" in held
            os.write(stderr, f"error: {_cannot_go_on(held)}\n".encode() if fatal else held.encode())
        os._exit(0)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)
    sys.stderr = os.fdopen(stderr, "w", buffering=1)


_OF_THE_COORDINATION = re.compile(r"coordination_service|preemption_sync_manager|Terminating process because")


def _cannot_go_on(log: str) -> str:
    if "RegisterTask" in log:
        return _cannot_join(log.partition("absl::Status: ")[2])
    lost = re.findall(r"unhealthy \(stopped sending heartbeats\):\n((?:\d+\n)+)", log)
    names = ", ".join(lost[0].split()) if lost else "0"
    return f"lost process {names}, which was killed or cannot be reached: the same commands resume the run"


def _cannot_join(reason: str) -> str:
    first = (reason.splitlines() or ["no answer"])[0][:200]
    return (
        f"not all processes have joined ({first}): start --num_processes processes with "
        "different --process_id and the same --coordinator_address"
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
