"""The one home of pmap, on the four fake devices that `conftest.py` sets up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import Compilations
from posterior_matching import parallel
from posterior_matching.errors import UserError

TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": (np.int32(7), jnp.ones(()))}


def test_replicate_puts_a_copy_on_every_device():
    everywhere = parallel.replicate(TREE)
    assert jax.tree.structure(everywhere) == jax.tree.structure(TREE)
    for leaf, original in zip(jax.tree.leaves(everywhere), jax.tree.leaves(TREE), strict=True):
        assert leaf.shape == (4, *np.shape(original)) and leaf.dtype == np.asarray(original).dtype
        assert leaf.sharding.device_set == set(jax.local_devices())
        np.testing.assert_array_equal(leaf, np.broadcast_to(original, leaf.shape))


def test_unreplicate_outlives_its_source():
    everywhere = parallel.replicate(TREE)
    first = parallel.unreplicate(everywhere)
    parallel.pmap(lambda t: jax.tree.map(lambda a: a + 1, t), donate_argnums=0)(everywhere)  # reuses the buffers
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, TREE)


def test_shard_gives_device_d_slice_d():
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    sharded = parallel.shard({"x": x})["x"]
    np.testing.assert_array_equal(sharded, x)
    owned = {part.device: np.asarray(part.data).reshape(2) for part in sharded.addressable_shards}
    for device, row in zip(jax.local_devices(), x, strict=True):
        np.testing.assert_array_equal(owned[device], row)


def test_moving_data_to_the_devices_compiles_once_for_each_shape():
    for move in (parallel.shard, parallel.replicate):
        rows = np.arange(44.0).reshape(4, 11)
        move({"x": rows})
        compilations = Compilations()
        for step in range(5):
            move({"x": rows + step})
        parallel.wait_for_all_processes()
        assert len(compilations) == 0
        move({"x": rows[:, :9]})
        assert len(compilations) > 0  # the counter counts


def test_local_devices_count_as_axis_index_does():
    counted = parallel.pmap(lambda _: jax.lax.axis_index(parallel.AXIS))(np.zeros(4))
    np.testing.assert_array_equal(counted, list(parallel.local_devices()))


def test_pmap_reduces_over_the_axis():
    mean = parallel.pmap(lambda x: jax.lax.pmean(x, parallel.AXIS))(np.array([1.0, 2.0, 3.0, 10.0]))
    np.testing.assert_array_equal(mean, [4.0] * 4)


def test_any_process_of_one():
    assert parallel.any_process(True) and not parallel.any_process(False)


def test_errors_of_a_missing_process_are_told_from_others(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")  # as JAX raises while dispatching
    runtime = jax.errors.JaxRuntimeError("INTERNAL: a collective operation failed")
    for joined in (False, True):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda joined=joined: joined)
        found = [parallel.is_lost_contact(error) for error in (gloo, runtime, ValueError("shapes do not match"))]
        assert found == [joined, joined, False]


@pytest.mark.parametrize("address", ["localhost:9", "nonsense"])
def test_a_process_without_the_others_says_so_in_one_line(address):
    with pytest.raises(UserError, match=rf"^cannot join the other processes at '{address}' \(.*\): start [^\n]*$"):
        parallel.initialize(address, 2, 1, seconds=1)
