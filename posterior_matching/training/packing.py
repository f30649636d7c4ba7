"""Parameters as two long vectors, for the optimiser.

An update treats all parameters alike. Array by array it takes several kernels each, thousands in a deep model, which
cost more than their arithmetic; over vectors it takes a handful.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Packed(NamedTuple):
    """The values of many arrays, one after another, `[number of values]` each."""

    matrices: Any  # of arrays with two axes or more
    vectors: Any  # of all others


class Packing:
    """How the arrays of an `nnx.State` lie in a `Packed`.

    Args:
        like: A state with the arrays' structure and shapes; all are float32.
    """

    def __init__(self, like: nnx.State):
        leaves, self._structure = jax.tree.flatten(like)
        assert all(leaf.dtype == np.float32 for leaf in leaves)
        self._shapes = [leaf.shape for leaf in leaves]

    def pack(self, state: nnx.State) -> Packed:
        """Copies a state into NumPy vectors."""
        parts = Packed([np.zeros(0, np.float32)], [np.zeros(0, np.float32)])
        for leaf in jax.tree.leaves(state):
            _part(parts, leaf.shape).append(np.ravel(leaf))
        return Packed(*map(np.concatenate, parts))

    def unpack(self, packed: Packed) -> nnx.State:
        """The state that was packed; its arrays are views where the vectors are NumPy arrays."""
        parts = Packed(*(iter(self._split(kind, vector)) for kind, vector in packed._asdict().items()))
        leaves = [next(_part(parts, shape)).reshape(shape) for shape in self._shapes]
        return jax.tree.unflatten(self._structure, leaves)

    def _split(self, kind: str, vector: Any) -> list[Any]:
        sizes = [math.prod(shape) for shape in self._shapes if _part(Packed("matrices", "vectors"), shape) == kind]
        split = jnp.split if isinstance(vector, jax.Array) else np.split
        return split(vector, np.cumsum(sizes))[:-1]  # what follows the last array is empty


def _part(packed: Packed, shape: tuple[int, ...]) -> Any:
    return packed.matrices if len(shape) >= 2 else packed.vectors
