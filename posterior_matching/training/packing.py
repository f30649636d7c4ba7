"""Parameters as few arrays, for the optimiser.

An update treats all parameters alike. Array by array it takes several kernels each, thousands in a deep model, which
cost more than their arithmetic. So matrices and convolution kernels are one long vector. Biases stay as they are: XLA
would fuse their slices into whatever adds them, and compile each of those kernels by itself instead of once per shape.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Packed(NamedTuple):
    """The values of many arrays."""

    matrices: Any  # of all arrays with two axes or more, one after another, `[number of values]`
    others: Any  # a list of all other arrays, as they are


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the arrays of an `nnx.State` lie in a `Packed`."""

    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, state: nnx.State) -> "Packing":
        """The packing of states with this one's structure and shapes; all arrays are float32."""
        leaves, structure = jax.tree.flatten(state)
        assert all(leaf.dtype == np.float32 for leaf in leaves)
        return cls(structure, tuple(leaf.shape for leaf in leaves))

    def pack(self, state: nnx.State) -> Packed:
        """Copies a state into NumPy arrays."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        matrices = [np.ravel(leaf) for leaf in leaves if leaf.ndim >= 2]
        return Packed(np.concatenate([np.zeros(0, np.float32), *matrices]), [leaf for leaf in leaves if leaf.ndim < 2])

    def unpack(self, packed: Packed) -> nnx.State:
        """The state that was packed; views where it holds NumPy arrays."""
        split: Any = jnp.split if isinstance(packed.matrices, jax.Array) else np.split
        sizes = [math.prod(shape) for shape in self.shapes if len(shape) >= 2]
        matrices, others = iter(split(packed.matrices, np.cumsum(sizes))), iter(packed.others)
        leaves = [next(matrices).reshape(shape) if len(shape) >= 2 else next(others) for shape in self.shapes]
        return jax.tree.unflatten(self.structure, leaves)
