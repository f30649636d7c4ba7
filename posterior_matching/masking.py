"""The mask convention of the whole project.

A mask `b` is float32, **1 = observed, 0 = unobserved**. It has the shape of the data `x`, except that all colour
channels of an image share one mask channel: images [..., H, W, C] have masks [..., H, W, 1]. A model only sees
`x_o = x * b` of `x`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posterior_matching.errors import UserError


def mask_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the mask shape of one example: (H, W, C) -> (H, W, 1), and (d,) -> (d,)."""
    return (*event_shape[:2], 1) if len(event_shape) == 3 else tuple(event_shape)


def observed_only(x: jax.Array, b: jax.Array) -> jax.Array:
    """Returns x_o: `x` where `b` is 1, and 0 elsewhere. NaN reaches neither the result nor a gradient."""
    return jnp.where(b == 1, x, 0.0)


def partial_input(x: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the input of every conditional model, `concat([x_o, b])`: `[B, 2 d]` or `[B, H, W, C + 1]`."""
    return jnp.concatenate([observed_only(x, b), b], axis=-1)


def existing(x: jax.Array) -> jax.Array:
    """Returns the mask of the values that exist, 0 where `x` is NaN: `[B, d]` or `[B, H, W, 1]`."""
    exists = ~jnp.isnan(x)
    return (exists.all(-1, keepdims=True) if x.ndim == 4 else exists).astype(jnp.float32)


def checked(x: Any, b: Any, event_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns examples and masks as arrays that match a model for examples of `event_shape`.

    Args:
        x: `[B, *event_shape]`, NumPy or JAX; not NaN where b = 1.
        b: Mask, `[B, *mask_shape(event_shape)]`, every value 0 or 1 (or bool).
        event_shape: Shape of one example.

    Raises:
        UserError: A shape or, outside of compiled functions, a value is wrong.
    """
    x, b = jnp.asarray(x), jnp.asarray(b, jnp.float32)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for name, array, expected in [("x", x, event_shape), ("b", b, mask_shape(event_shape))]:
        if array.shape != (*x.shape[:1], *expected):
            one = ", ".join(map(str, expected))
            raise UserError(
                f"{name} has shape {array.shape}, but the model takes [B, {one}], with B the number of examples in x"
            )
    if not isinstance(b, jax.core.Tracer):
        observed = np.asarray(b) == 1  # with NumPy, which also works while JAX traces
        if not (observed | (np.asarray(b) == 0)).all():
            raise UserError("b is a mask: every value must be 1 (observed) or 0 (unobserved)")
        if not isinstance(x, jax.core.Tracer) and (np.isnan(x) & observed).any():
            raise UserError("x is NaN where b is 1: missing values are not observed, so set b to 0 there")
    return x, b


def partial_input_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one example of `partial_input`: (H, W, C) -> (H, W, C + 1), and (d,) -> (2 d,)."""
    return (*event_shape[:-1], event_shape[-1] + mask_shape(event_shape)[-1])
