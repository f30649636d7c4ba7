"""Two-dimensional convolution and its transpose, fast in the forward and backward pass on every backend.

`conv` and `conv_transpose` are two sides of one bilinear map: each is the other's derivative with respect to the
images, and both have the same derivative with respect to the kernel. `_method` decides once, from the shapes, how to
compute the three.

On CPUs XLA runs convolutions with stride one, and kernel gradients of strided ones, at a good fraction of the peak
rate, but convolutions dilated by the stride (input gradients of strided convolutions, and hence transposed
convolutions) 4 to 20 times slower. `_Strided` computes those at stride one.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from posterior_matching.numerics import on_cpu

_LAYOUT = ("NHWC", "HWIO", "NHWC")


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
    return _forward(_method(x.shape[1:3], kernel.shape, stride, padding), x, kernel)


def conv_transpose(y: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """Applies the transpose of `x -> conv(x, kernel)`, a linear map, to `y`.

    Args:
        y: `[B, H, W, O]`.
        kernel: `[K, K, I, O]`, as for `conv`.
        stride: Stride of both axes.
        padding: "SAME" (output size `H * stride`) or "VALID" (`(H - 1) * stride + K`).

    Returns:
        `[B, H', W', I]`.
    """
    height, width = (n * stride if padding == "SAME" else (n - 1) * stride + kernel.shape[0] for n in y.shape[1:3])
    return _transposed(_method((height, width), kernel.shape, stride, padding), y, kernel)


def _method(size: tuple[int, ...], kernel_shape: tuple[int, ...], stride: int, padding: str) -> "_General":
    """Selects how to convolve images of `size` pixels."""
    k, _, features_in, features_out = kernel_shape
    cls = _General
    if padding == "VALID" and size == (k, k):
        cls = _Dense
    elif k == 1 and stride == 1:
        cls = _Pointwise
    elif on_cpu() and stride > 1:
        cls = _Strided
    elif on_cpu() and k * k * features_in <= features_out:
        cls = _FewInputs
    return cls((size[0], size[1]), k, stride, padding)


@dataclasses.dataclass(frozen=True)
class _General:
    """A convolution `y = forward(x, kernel)` and its derivatives, as XLA computes them.

    Shapes: x `[B, *size, I]`, kernel `[K, K, I, O]`, y `[B, H', W', O]`. Large batches are split, see `_blocks`.
    """

    size: tuple[int, int]
    k: int
    stride: int
    padding: str

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns y."""
        return _convolve(x, kernel, self.stride, self.padding)

    def input_gradient(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        """Gradient of `sum(y * forward(x, kernel))` with respect to x: a convolution of y, dilated by the stride."""
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _convolve(y, flipped, 1, self._gradient_pads(y), dilation=self.stride)

    def kernel_gradient(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Gradient of `sum(y * forward(x, kernel))` with respect to the kernel: a sum over (blocks of) images."""
        kernel = jax.ShapeDtypeStruct((self.k, self.k, x.shape[-1], y.shape[-1]), x.dtype)

        def one_block(x: jax.Array, y: jax.Array) -> jax.Array:
            strides, layout = (self.stride, self.stride), _LAYOUT
            forward = functools.partial(
                lax.conv_general_dilated, x, window_strides=strides, padding=self.padding, dimension_numbers=layout
            )
            return jax.linear_transpose(forward, kernel)(y)[0]

        if not on_cpu() or len(x) == 1:
            return one_block(x, y)
        # On CPUs blocks of up to 4,096 pixels are up to 3 times as fast as all images at once, and odd numbers of
        # images take up to 5 times as long as even ones (docs/notes.md). An image of zeros adds nothing.
        if len(x) % 2:
            x, y = (jnp.pad(a, ((0, 1), (0, 0), (0, 0), (0, 0))) for a in (x, y))
        pixels, num_pairs = y.size // y.shape[-1], len(x) // 2
        blocks = min(1 << ((pixels - 1) // 4096).bit_length(), 32, num_pairs)  # powers of two are equal
        if blocks == 1:
            return one_block(x, y)
        pairs = (a.reshape(num_pairs, 2, *a.shape[1:]) for a in (x, y))
        parts = ([part.reshape(-1, *part.shape[2:]) for part in jnp.array_split(a, blocks)] for a in pairs)
        return functools.reduce(jnp.add, map(one_block, *parts))

    def _before(self) -> list[int]:
        """The number of zeros that `padding` adds before the first row and column of x."""
        return [lax.padtype_to_pads((n,), (self.k,), (self.stride,), self.padding)[0][0] for n in self.size]

    def _gradient_pads(self, y: jax.Array) -> list[tuple[int, int]]:
        return [
            (self.k - 1 - before, n - 1 - (m - 1) * self.stride + before)
            for before, n, m in zip(self._before(), self.size, y.shape[1:3], strict=True)
        ]


class _Dense(_General):
    """One output position: a matrix product with the flattened kernel."""

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("bhwi,hwio->bo", x, kernel)[:, None, None, :]

    def input_gradient(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("bo,hwio->bhwi", y[:, 0, 0, :], kernel)

    def kernel_gradient(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("bhwi,bo->hwio", x, y[:, 0, 0, :])


class _Pointwise(_General):
    """A 1x1 kernel at stride one: the same linear layer at every position, on CPUs twice as fast as a convolution."""

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel.reshape(kernel.shape[2:])

    def input_gradient(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        return y @ kernel.reshape(kernel.shape[2:]).T

    def kernel_gradient(self, x: jax.Array, y: jax.Array) -> jax.Array:
        # Of two matrices, so that XLA does not transpose x.
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if on_cpu() and x.shape[1] > y.shape[1]:  # there wide results are twice as fast as tall ones
            return (y.T @ x).T[None, None]
        return (x.T @ y)[None, None]


class _FewInputs(_General):
    """On CPUs, at stride one, with few channels in: the input gradient is one matrix product, `[B H W, O]` by
    `[O, K K I]`, whose columns are shifted and added. 2 to 5 times as fast as a convolution to few channels.
    """

    def input_gradient(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        k, (height, width) = self.k, self.size
        taps = jnp.einsum("bhwo,tuio->bhwtui", y, kernel)
        taps = jnp.pad(taps, ((0, 0), *self._gradient_pads(y), (0, 0), (0, 0), (0, 0)))
        shifts = itertools.product(range(k), range(k))
        shifted = (taps[:, k - 1 - t :, k - 1 - u :][:, :height, :width, t, u] for t, u in shifts)
        return functools.reduce(jnp.add, shifted)


class _Strided(_General):
    """On CPUs, with a stride: the input gradient is a convolution at stride one, with one group of output channels per
    phase of the stride ("sub-pixel" convolution, Shi et al. 2016, arXiv 1609.05158).

    Accelerators do not multiply the zeros of a dilated convolution, so they use `_General`.
    """

    def input_gradient(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        # Pixel stride * q + p of x (phase p) receives y[q + a] through tap t = p + before - stride * a.
        stride, features = self.stride, kernel.shape[2]
        (low_h, high_h, pick_h), (low_w, high_w, pick_w) = (_phase_taps(self.k, stride, p) for p in self._before())
        phases = jnp.einsum("apt,bqu,tuio->aboipq", pick_h, pick_w, kernel)
        phases = phases.reshape(*phases.shape[:3], -1)
        quotient = [-(-n // stride) for n in self.size]
        pads = [(-low_h, quotient[0] - y.shape[1] + high_h), (-low_w, quotient[1] - y.shape[2] + high_w)]
        out = _convolve(y, phases, 1, pads)
        out = out.reshape(-1, *quotient, features, stride, stride)  # [B, Q, Q, I, P, P]
        out = out.transpose(0, 1, 4, 2, 5, 3).reshape(-1, quotient[0] * stride, quotient[1] * stride, features)
        return out[:, : self.size[0], : self.size[1]]


def _phase_taps(k: int, stride: int, before: int) -> tuple[int, int, np.ndarray]:
    """Returns the lowest and highest offset `a`, and `[A, P, K]` with 1 where offset `a` feeds phase `p` by tap `t`."""
    feeds = [(a, p, p + before - stride * a) for a in range(-k, k + 1) for p in range(stride)]
    feeds = [(a, p, t) for a, p, t in feeds if 0 <= t < k]
    low, high = min(a for a, _, _ in feeds), max(a for a, _, _ in feeds)
    pick = np.zeros((high - low + 1, stride, k), np.float32)
    for a, p, t in feeds:
        pick[a - low, p, t] = 1.0
    return low, high, pick


def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: str | list[tuple[int, int]], dilation: int = 1
) -> jax.Array:
    strides, dilations = (stride, stride), (dilation, dilation)
    blocks = [
        lax.conv_general_dilated(block, kernel, strides, padding, lhs_dilation=dilations, dimension_numbers=_LAYOUT)
        for block in _blocks(x)
    ]
    return jnp.concatenate(blocks)


def _blocks(x: jax.Array) -> list[jax.Array]:
    """Splits batches of 128 or more images into 16 blocks on CPUs, so that a convolution's working set stays in the
    cache, which makes it a fifth faster. (A compiled loop over the blocks is 30 times slower than unrolling them.)
    With 8 blocks the convolutions of smaller images ran on one core: XLA gives kernels to another thread only if more
    than 8 are ready.
    """
    return jnp.array_split(x, 16 if len(x) >= 128 and on_cpu() else 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(method: _General, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return method.forward(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(method: _General, y: jax.Array, kernel: jax.Array) -> jax.Array:
    return method.input_gradient(y, kernel)


_Pair = tuple[jax.Array, jax.Array]


def _forward_fwd(method: _General, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Pair]:
    return _forward(method, x, kernel), (x, kernel)


def _forward_bwd(method: _General, residuals: _Pair, g: jax.Array) -> _Pair:
    x, kernel = residuals
    return _transposed(method, g, kernel), method.kernel_gradient(x, g)


def _transposed_fwd(method: _General, y: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Pair]:
    return _transposed(method, y, kernel), (y, kernel)


def _transposed_bwd(method: _General, residuals: _Pair, g: jax.Array) -> _Pair:
    y, kernel = residuals
    return _forward(method, g, kernel), method.kernel_gradient(g, y)


_forward.defvjp(_forward_fwd, _forward_bwd)
_transposed.defvjp(_transposed_fwd, _transposed_bwd)
