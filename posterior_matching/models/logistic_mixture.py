"""A likelihood for integer pixel values, the discretised mixture of logistics (PixelCNN++, arXiv 1701.05517)."""

import math

import jax
import jax.numpy as jnp


class DiscretisedLogisticMixture:
    """Mixtures of logistics over integer pixel values 0, ..., L - 1: one mixture per pixel, over its channels jointly.

    In units where the values span [-1, 1], component k has a location m_k, a scale s_k and the distribution function
    F_k; value v has probability F_k(v + 1/2) - F_k(v - 1/2), and the two extreme values also get the tails, so the
    probabilities sum to one. With three channels the green location is shifted by a linear function of red, and the
    blue one by a linear function of red and green (as in PixelCNN++, Salimans et al. 2017, but with unbounded
    coefficients). The parameters are `[..., logistic_mixture_parameters(C, K)]` for C channels, 1 or 3.
    """

    def __init__(self, parameters: jax.Array, channels: int, num_levels: int):
        num_components = parameters.shape[-1] // logistic_mixture_parameters(channels, 1)
        parameters = parameters.reshape(*parameters.shape[:-1], num_components, -1)
        logits, loc, scale, shift = jnp.split(parameters, [1, 1 + channels, 1 + 2 * channels], axis=-1)
        self._log_weight = jax.nn.log_softmax(logits[..., 0])  # [..., K]
        self._loc, self._shift = loc, shift  # [..., K, C] and [..., K, 0 or 3]
        self._scale = jax.nn.softplus(scale) + math.exp(-7)  # [..., K, C]
        self._channels, self._last = channels, num_levels - 1

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Log-probability in nats of pixels `[..., C]`, integers 0..L-1, over all channels jointly: `[..., 1]`."""
        x = x[..., None, :]  # [..., 1, C]
        value = 2.0 * x / self._last - 1.0
        centred = value - _locations(self._loc, self._shift, value)  # [..., K, C]
        half = 1.0 / self._last  # half the distance between two values
        upper, lower = (centred + half) / self._scale, (centred - half) / self._scale
        first, last = x < 0.5, x > self._last - 0.5
        # F(u) - F(l) = F(u) (1 - F(l)) (1 - exp(l - u)), which keeps full precision however small it is.
        below = jnp.where(last, 0.0, jax.nn.log_sigmoid(upper))
        above = jnp.where(first, 0.0, jax.nn.log_sigmoid(-lower))
        width = jnp.where(first | last, 0.0, jnp.log(-jnp.expm1(-2.0 * half / self._scale)))
        component = (below + above + width).sum(-1)  # over channels
        return jax.nn.logsumexp(self._log_weight + component, axis=-1, keepdims=True)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws pixels `[..., C]`."""
        key_component, key_noise = jax.random.split(key)
        component = jax.random.categorical(key_component, self._log_weight)[..., None, None]
        loc, scale, shift = (
            jnp.take_along_axis(a, component, axis=-2)[..., 0, :] for a in (self._loc, self._scale, self._shift)
        )
        noise = scale * jax.random.logistic(key_noise, scale.shape)
        x = jnp.zeros_like(loc)
        for _ in range(self._channels):  # a channel depends only on those before it: after round c it is final
            x = jnp.round(self._level(_locations(loc, shift, 2.0 * x / self._last - 1.0) + noise))
        return x

    @property
    def mean(self) -> jax.Array:
        """Weighted average of the components' locations, each clipped to [-1, 1], rounded: pixels `[..., C]`.

        A pixel's channels come from one component, so E[green] = sum_k pi_k (m_k + c_k E[red | k]): each component is
        shifted by its own red. This is exact but for the rounding where no logistic reaches beyond [-1, 1].
        """
        value = jnp.zeros_like(self._loc)
        for _ in range(self._channels):  # as in `sample`
            value = jnp.clip(_locations(self._loc, self._shift, value), -1.0, 1.0)
        return jnp.round(self._level(jnp.einsum("...k,...kc->...c", jnp.exp(self._log_weight), value)))

    def _level(self, value: jax.Array) -> jax.Array:
        return jnp.clip((value + 1.0) / 2.0, 0.0, 1.0) * self._last


def _locations(loc: jax.Array, shift: jax.Array, value: jax.Array) -> jax.Array:
    """Locations `[..., C]` of the channels of a logistic, given the values of the channels before each."""
    if loc.shape[-1] == 1:
        return loc
    red, green = value[..., 0], value[..., 1]
    of_green, of_blue = shift[..., 0] * red, shift[..., 1] * red + shift[..., 2] * green
    return loc + jnp.stack([jnp.zeros_like(of_green), of_green, of_blue], axis=-1)


def logistic_mixture_parameters(channels: int, num_components: int) -> int:
    """The number of parameters per pixel of a `DiscretisedLogisticMixture`: each component's weight, locations, scales
    and shifts."""
    return num_components * (1 + 2 * channels + channels * (channels - 1) // 2)
