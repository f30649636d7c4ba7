"""Parameters as two vectors, for the optimiser.

An update treats all parameters alike. Array by array it takes several kernels each, thousands in a deep model, which
cost more than their arithmetic.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Packed(NamedTuple):
    """The values of many arrays, one after another."""

    matrices: Any  # of all arrays with two axes or more, `[number of values]`
    vectors: Any  # of all others


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

    def starts(self) -> list[np.int32]:
        """Where each array begins in its vector."""
        ends = [0, 0]
        starts = []
        for shape in self.shapes:
            starts.append(np.int32(ends[len(shape) >= 2]))
            ends[len(shape) >= 2] += math.prod(shape)
        return starts

    def pack(self, state: nnx.State) -> Packed:
        """Packs a state: into NumPy arrays, or into traced ones within a compiled function."""
        leaves = jax.tree.leaves(state)
        xp: Any = jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np

        def vector(chosen: list[Any]) -> Any:
            return xp.concatenate([np.zeros(0, np.float32), *(xp.ravel(leaf) for leaf in chosen)])

        return Packed(vector([a for a in leaves if a.ndim >= 2]), vector([a for a in leaves if a.ndim < 2]))

    def unpack(self, packed: Packed) -> nnx.State:
        """The state that was packed into NumPy arrays; views of them."""
        return self._split(packed, self.starts(), lambda vector, start, size: vector[start : start + size])

    def unpack_traced(self, packed: Packed, starts: list[jax.Array]) -> nnx.State:
        """The state that was packed, within a compiled function.

        Args:
            packed: The arrays.
            starts: Those of `starts()`, as arguments of the compiled function. Were they constants, XLA would compile
                every kernel that reads a parameter by itself, instead of one for all parameters of a shape.
        """

        def piece(vector: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice(vector, (start,), (size,), allow_negative_indices=False)

        return self._split(packed, starts, piece)

    def _split(self, packed: Packed, starts: list[Any], piece: Any) -> nnx.State:
        leaves = (
            piece(packed.matrices if len(shape) >= 2 else packed.vectors, start, math.prod(shape)).reshape(shape)
            for shape, start in zip(self.shapes, starts, strict=True)
        )
        return jax.tree.unflatten(self.structure, leaves)
