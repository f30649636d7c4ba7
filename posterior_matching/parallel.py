"""Data parallelism by pmap: one program on every local device of every process, with batches split along `AXIS`."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

AXIS = "batch"
Tree = TypeVar("Tree")


def initialize(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Joins this process to a run over several processes; call it before any other use of JAX.

    Args:
        coordinator_address: `host:port` of process 0, reachable from all.
        num_processes: The number of processes.
        process_id: The index of this one, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator_address, num_processes, process_id)


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
