"""Two-dimensional convolution and its transpose, fast forwards and backwards on every backend.

On CPUs XLA runs a convolution with stride one, and the kernel gradient of a strided one, at a good share of the
processor's rate, but convolutions dilated by the stride (the input gradient of a strided convolution, and every
convolution that a transposed one differentiates into) 4 to 20 times slower. Both functions below are therefore given
their derivatives in terms of each other, and the transposed convolution is computed at stride one, one group of output
channels per phase of the stride ("sub-pixel" convolution, Shi et al. 2016, arXiv 1609.05158). Large batches go in
blocks, see `_blocks`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from posterior_matching.numerics import on_cpu

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Convolves images.

    Args:
        x: `[B, H, W, I]`.
        kernel: `[K, K, I, O]`.
        stride: Stride of both axes.
        padding: "SAME" (output size `ceil(H / stride)`) or "VALID" (`ceil((H - K + 1) / stride)`).

    Returns:
        `[B, H', W', O]`.
    """
    if padding == "VALID" and x.shape[1:3] == kernel.shape[:2]:  # one output position: a matrix product
        return jnp.einsum("bhwi,hwio->bo", x, kernel)[:, None, None, :]
    if _is_linear(kernel, stride):
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    return _convolve(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_transpose(y: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Applies the transpose of `conv`: the linear map whose matrix is that of `x -> conv(x, kernel)`, transposed.

    Args:
        y: `[B, H, W, O]`.
        kernel: `[K, K, I, O]`, as `conv` takes it.
        stride: Stride of both axes.
        padding: "SAME" (output size `H * stride`) or "VALID" (`(H - 1) * stride + K`).

    Returns:
        `[B, H', W', I]`.
    """
    if padding == "VALID" and y.shape[1:3] == (1, 1):  # one input position: a matrix product
        return jnp.einsum("bo,hwio->bhwi", y[:, 0, 0, :], kernel)
    size = tuple(n * stride if padding == "SAME" else (n - 1) * stride + kernel.shape[0] for n in y.shape[1:3])
    return _transpose(y, kernel, stride, padding, size)


def _is_linear(kernel: jax.Array, stride: int) -> bool:
    """A 1x1 kernel at stride one: the same linear layer at every position, on CPUs twice as fast as a convolution."""
    return kernel.shape[:2] == (1, 1) and stride == 1


def _transpose(y: jax.Array, kernel: jax.Array, stride: int, padding: str, size: tuple[int, int]) -> jax.Array:
    """`conv_transpose` to an output of the given `size`, of which several share one `y` when `stride > 1`."""
    if _is_linear(kernel, stride):
        return jnp.einsum("bhwo,io->bhwi", y, kernel[0, 0])
    k = kernel.shape[0]
    before = [lax.padtype_to_pads((n,), (k,), (stride,), padding)[0][0] for n in size]
    if stride == 1 or not on_cpu():  # GPUs and TPUs dilate without multiplying the zeros
        pads = [(k - 1 - p, n - 1 - (m - 1) * stride + p) for p, n, m in zip(before, size, y.shape[1:3], strict=True)]
        if k * k * kernel.shape[2] <= kernel.shape[3] and on_cpu():
            return _transpose_as_product(y, kernel, pads, size)
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _convolve(y, flipped, 1, pads, dilation=stride)
    # Output position stride * q + p (phase p) receives y[q + a] through tap t = p + before - stride * a.
    taps = [_phase_taps(k, stride, p) for p in before]
    (low_h, high_h, pick_h), (low_w, high_w, pick_w) = taps
    phases = jnp.einsum("apt,bqu,tuio->aboipq", pick_h, pick_w, kernel)
    phases = phases.reshape(*phases.shape[:3], -1)
    quotient = [-(-n // stride) for n in size]
    pads = [(-low_h, quotient[0] - y.shape[1] + high_h), (-low_w, quotient[1] - y.shape[2] + high_w)]
    out = _convolve(y, phases, 1, pads)
    out = out.reshape(-1, *quotient, kernel.shape[2], stride, stride)  # [B, Q, Q, I, P, P]
    out = out.transpose(0, 1, 4, 2, 5, 3).reshape(-1, quotient[0] * stride, quotient[1] * stride, kernel.shape[2])
    return out[:, : size[0], : size[1]]


def _transpose_as_product(
    y: jax.Array, kernel: jax.Array, pads: list[tuple[int, int]], size: tuple[int, int]
) -> jax.Array:
    """Computes it at stride one as one matrix product, [B H W, O] x [O, K K I], whose columns are shifted and added:
    2 to 5 times as fast as a convolution to few channels.
    """
    k, (height, width) = kernel.shape[0], size
    taps = jnp.einsum("bhwo,tuio->bhwtui", y, kernel)
    taps = jnp.pad(taps, ((0, 0), *pads, (0, 0), (0, 0), (0, 0)))
    shifts = itertools.product(range(k), range(k))
    return sum(taps[:, k - 1 - t :, k - 1 - u :][:, :height, :width, t, u] for t, u in shifts)


def _phase_taps(k: int, stride: int, before: int) -> tuple[int, int, np.ndarray]:
    """Returns the lowest and highest offset `a`, and `[A, P, K]` with 1 where offset `a` feeds phase `p` by tap `t`."""
    feeds = [(a, p, p + before - stride * a) for a in range(-k, k + 1) for p in range(stride)]
    feeds = [(a, p, t) for a, p, t in feeds if 0 <= t < k]
    low, high = min(a for a, _, _ in feeds), max(a for a, _, _ in feeds)
    pick = np.zeros((high - low + 1, stride, k), np.float32)
    for a, p, t in feeds:
        pick[a - low, p, t] = 1.0
    return low, high, pick


def _kernel_gradient(x: jax.Array, g: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Gradient of `sum(g * conv(x, kernel))` in the kernel; the sum over images is one over blocks of them."""
    if padding == "VALID" and x.shape[1:3] == kernel.shape[:2]:
        return jnp.einsum("bhwi,bo->hwio", x, g[:, 0, 0, :])
    if _is_linear(kernel, stride):
        return jnp.einsum("bhwi,bhwo->io", x, g)[None, None]
    return sum(
        _one_kernel_gradient(*block, kernel, stride, padding) for block in zip(_blocks(x), _blocks(g), strict=True)
    )


def _one_kernel_gradient(x: jax.Array, g: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    forward = functools.partial(
        lax.conv_general_dilated, x, window_strides=(stride, stride), padding=padding, dimension_numbers=_LAYOUT
    )
    return jax.linear_transpose(forward, kernel)(g)[0]  # linear in the kernel


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: str | list[tuple[int, int]], dilation: int = 1
) -> jax.Array:
    options = {"lhs_dilation": (dilation, dilation), "dimension_numbers": _LAYOUT}
    blocks = [lax.conv_general_dilated(block, kernel, (stride, stride), padding, **options) for block in _blocks(x)]
    return jnp.concatenate(blocks)


def _blocks(x: jax.Array) -> list[jax.Array]:
    """Many images in 8 blocks on CPUs, whose caches hold what a convolution of few images touches: for 128 to 256
    images, kernel gradients are up to 5 times as fast, other convolutions a fifth faster. (A compiled loop over blocks
    is 30 times slower than these written out.)
    """
    return jnp.array_split(x, 8 if len(x) >= 128 and on_cpu() else 1)


def _conv_forward(x, kernel, stride, padding):
    return conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, g):
    x, kernel = residuals
    if padding == "VALID" and x.shape[1:3] == kernel.shape[:2]:
        x_gradient = conv_transpose(g, kernel, stride, padding)
    else:
        x_gradient = _transpose(g, kernel, stride, padding, x.shape[1:3])
    return x_gradient, _kernel_gradient(x, g, kernel, stride, padding)


def _conv_transpose_forward(y, kernel, stride, padding):
    return conv_transpose(y, kernel, stride, padding), (y, kernel)


def _conv_transpose_backward(stride, padding, residuals, g):
    y, kernel = residuals
    return conv(g, kernel, stride, padding), _kernel_gradient(g, y, kernel, stride, padding)


conv.defvjp(_conv_forward, _conv_backward)
conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)
