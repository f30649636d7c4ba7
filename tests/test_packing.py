"""Parameters as few arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from helpers.arrays import by_path
from posterior_matching.training.packing import Packed, Packing

SHAPES = {"scalar": (), "kernel": (3, 3, 2, 4), "bias": (4,), "empty": (0, 5), "matrix": (4, 5)}


def state(seed):
    rng = np.random.default_rng(seed)
    arrays = {name: nnx.Param(jnp.asarray(rng.normal(size=s), jnp.float32)) for name, s in SHAPES.items()}
    return nnx.State({"layers": nnx.State({0: nnx.State(arrays)}), "gain": nnx.Param(jnp.float32(seed))})


def unpack_compiled(packing, packed):
    return jax.jit(packing.unpack_traced)(packed, packing.starts())


@pytest.mark.parametrize("unpack", [Packing.unpack, unpack_compiled])
def test_what_is_packed_is_unpacked(unpack):
    packing, second = Packing.of(state(0)), state(2)
    packed = packing.pack(second)
    assert packed.matrices.shape == (72 + 20,) and packed.vectors.shape == (1 + 4 + 1,)
    found, expected = by_path(unpack(packing, packed)), by_path(second)
    assert found.keys() == expected.keys() and len(found) == len(SHAPES) + 1
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_states_without_matrices_or_without_vectors_can_be_packed():
    for name in ("matrix", "bias"):
        only = nnx.State({name: nnx.Param(jnp.ones(SHAPES[name]))})
        packing = Packing.of(only)
        np.testing.assert_array_equal(packing.unpack(packing.pack(only))[name][...], np.ones(SHAPES[name]))


def test_gradients_and_updates_of_packed_parameters_are_those_of_the_arrays():
    first, packing = state(1), Packing.of(state(0))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-3))

    def loss(tree):
        return sum(jnp.sum(jnp.sin(3 * a)) for a in jax.tree.leaves(tree))

    updates, _ = optimizer.update(jax.grad(loss)(first), optimizer.init(first))
    expected = optax.apply_updates(first, updates)

    @jax.jit
    def packed_step(packed, starts):
        gradients = packing.pack(jax.grad(loss)(packing.unpack_traced(packed, starts)))
        updates, _ = optimizer.update(gradients, optimizer.init(packed))
        return optax.apply_updates(packed, updates)

    found = packed_step(packing.pack(first), packing.starts())
    assert isinstance(found, Packed)
    for a, b in zip(jax.tree.leaves(packing.unpack(found)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
