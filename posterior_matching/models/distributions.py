"""Distribution heads, which map network features to distributions. Only this file uses the distribution library.

Two kinds:

* over a latent `z: [..., e]` (`LATENT_HEADS`): `log_prob(z)` is summed over `e`, in nats;
* over data given the latent (`LIKELIHOOD_HEADS`): features are independent, `log_prob(x)` has one entry per feature, so
  any subset of them can be summed (`marginal_likelihood.log_prob_of_observed`).

All are a `Distribution`. Operations with a closed form for only some of them are functions.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from numpyro import distributions as dist

from posterior_matching.config import Blocks, Width
from posterior_matching.errors import UserError
from posterior_matching.models.columns import ColumnsLikelihood
from posterior_matching.models.networks import ResidualMLP, Shape
from posterior_matching.numerics import triangular

_MIN_SCALE = 1e-5
# With validation, grey values between 0 and 1 would have a Bernoulli log-probability of -inf. As in the paper, we use
# the cross-entropy.
_UNCHECKED = {"validate_args": False}


class Distribution(Protocol):
    """The interface that the models require; all of NumPyro's distributions have it."""

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        """Draws `[*sample_shape, *batch_shape, *event_shape]`."""

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density in nats of `value: [..., *batch_shape, *event_shape]`, summed over the event."""


class ExplicitDistribution(Distribution, Protocol):
    """A distribution with a known mean: every likelihood p(x | z), and every Gaussian."""

    @property
    def mean(self) -> jax.Array:
        """`[*batch_shape, *event_shape]`."""


class Mixture(Distribution, Protocol):
    """sum_c pi_c p_c."""

    def component_log_probs(self, value: jax.Array) -> jax.Array:
        """log pi_c + log p_c(value) in nats, one more axis than `log_prob`."""


class DiagonalGaussian(nnx.Module):
    """Features -> N(mean, diag(scale^2)) over `[event_size]`."""

    def __init__(self, features_shape: Shape, event_size: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(math.prod(features_shape), 2 * event_size, rngs=rngs)

    def __call__(self, features: jax.Array) -> ExplicitDistribution:
        """Maps features `[B, ...]` to a distribution with batch shape `[B]` and event shape `[e]`."""
        return diagonal_gaussian(self.linear(_flat(features)))

    def set_scale(self, scale: jax.Array) -> None:
        """Sets the scale, `[e]` and above 1e-5, independently of the features, as a starting point for training."""
        e, bias = len(scale), _bias(self.linear)
        self.linear.kernel[...] = self.linear.kernel[...].at[:, e:].set(0.0)
        bias[...] = bias[...].at[e:].set(jnp.log(jnp.expm1(scale - _MIN_SCALE)))  # softplus^-1


class PerFeatureGaussian(nnx.Module):
    """Features -> for each of `count` data features a distribution N(mean, diag(scale^2)) over `[event_size]`."""

    def __init__(self, features_shape: Shape, count: int, event_size: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(math.prod(features_shape), count * 2 * event_size, rngs=rngs)
        self.count = count

    def __call__(self, features: jax.Array, chosen: jax.Array | slice = slice(None)) -> dist.Distribution:
        """Maps features `[B, ...]` to the `chosen` distributions: batch shape `[B, chosen]`, event shape `[e]`."""
        return diagonal_gaussian(self.linear(_flat(features)).reshape(len(features), self.count, -1)[:, chosen])


class TriLGaussian(nnx.Module):
    """Features -> N(mean, L L^T) over `[event_size]`, L lower triangular with diagonal softplus + 1e-5."""

    def __init__(self, features_shape: Shape, event_size: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(math.prod(features_shape), tril_gaussian_parameters(event_size), rngs=rngs)
        self.event_size = event_size

    def __call__(self, features: jax.Array) -> ExplicitDistribution:
        """Maps features `[B, ...]` to a distribution with batch shape `[B]` and event shape `[e]`."""
        return tril_gaussian(self.linear(_flat(features)), self.event_size)


def diagonal_gaussian(parameters: jax.Array) -> dist.Distribution:
    """Parameters `[..., 2e]`, means and scales before the softplus, -> N(mean, diag(scale^2)) over `[..., e]`."""
    loc, scale = jnp.split(parameters, 2, axis=-1)
    return _diagonal(loc, jax.nn.softplus(scale) + _MIN_SCALE)


def diagonal_gaussian_sample(parameters: jax.Array, noise: jax.Array) -> jax.Array:
    """The draw mean + scale * noise from `diagonal_gaussian(parameters)`, `[..., e]`, for as many values of N(0, 1)."""
    q = diagonal_gaussian(parameters).base_dist
    return q.loc + q.scale * noise.reshape(q.loc.shape)


def tril_gaussian_parameters(event_size: int) -> int:
    """The number of parameters of `tril_gaussian`: e means and the e (e + 1) / 2 entries of a triangle."""
    return event_size + event_size * (event_size + 1) // 2


def tril_gaussian(parameters: jax.Array, event_size: int) -> dist.Distribution:
    """Parameters `[..., tril_gaussian_parameters(e)]` -> N(mean, L L^T) over `[..., e]`, diagonal softplus + 1e-5."""
    loc, entries = jnp.split(parameters, [event_size], axis=-1)
    scale_tril = triangular.fill(entries, event_size, lambda diagonal: jax.nn.softplus(diagonal) + _MIN_SCALE)
    return _TriLNormal(loc, scale_tril=scale_tril, **_UNCHECKED)


class AutoregressiveGMM(nnx.Module):
    """Features -> prod_i p(z_i | z_<i, c): every conditional is a one-dimensional mixture of Gaussians.

    One network serves all dimensions: the parameters of dimension i are slice i of
    `nnx.Linear(3 K e)(ResidualMLP([z * m_i, m_i, c]))`, where m_i marks the first i of the e dimensions, c are the
    features, flattened, and K is the number of components.
    """

    def __init__(
        self,
        features_shape: Shape,
        event_size: int,
        num_components: Width = 10,
        residual_blocks: Blocks = 2,
        hidden_units: Width = 256,
        *,
        rngs: nnx.Rngs,
    ):
        context_size = math.prod(features_shape)
        self.network = ResidualMLP((2 * event_size + context_size,), residual_blocks, hidden_units, rngs=rngs)
        self.linear = nnx.Linear(hidden_units, 3 * num_components * event_size, rngs=rngs)
        self.event_size = event_size

    def __call__(self, features: jax.Array) -> "AutoregressiveMixture":
        """Maps features `[B, ...]` to a distribution with batch shape `[B]` and event shape `[e]`."""
        return AutoregressiveMixture(self, _flat(features))


class AutoregressiveMixture:
    """The distribution that `AutoregressiveGMM` returns, for a batch of contexts `[B, C]`."""

    def __init__(self, head: AutoregressiveGMM, context: jax.Array):
        self._head, e = head, head.event_size
        # The first layer for z [e, h], m [e, h] and c [C, h]; per dimension, the output layer and its bias.
        self._first_z, self._first_m, first_c = jnp.split(head.network.linear_in.kernel[...], [e, 2 * e])
        self._output_bias = _bias(head.linear)[...].reshape(e, 1, -1)  # [e, 1, 3K]
        self._output = head.linear.kernel[...].reshape(len(first_c[0]), e, -1).swapaxes(0, 1)  # [e, h, 3K]
        # The context's contribution to the first layer is the same for every dimension and sample: [B, h].
        self._from_context = context @ first_c + _bias(head.network.linear_in)[...]

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Log-density in nats of `z: [..., B, e]`; returns `[..., B]`. One pass, no loop over dimensions."""
        z = jnp.moveaxis(z, -1, 0)  # [e, ..., B]
        # The first layer's output for [z * m_i, m_i, c] is a sum over the dimensions before i.
        before = jnp.tri(len(z), k=-1)  # [i, j] = 1 where j < i
        hidden = jnp.einsum("ij,j...,jh->i...h", before, z, self._first_z)
        mask = (before @ self._first_m).reshape(len(z), *[1] * (z.ndim - 1), -1)
        hidden = hidden + mask + self._from_context
        features = self._head.network.after_first(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)
        parameters = jnp.einsum("i...h,ihk->i...k", features, self._output)
        bias = self._output_bias.reshape(len(z), *[1] * (z.ndim - 1), -1)
        return _mixture(parameters + bias).log_prob(z).sum(0)

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        """Draws `[*sample_shape, B, e]`."""
        return self.sample_and_log_prob(key, sample_shape)[0]

    def sample_and_log_prob(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> tuple[jax.Array, jax.Array]:
        """Draws z `[*sample_shape, B, e]` and returns it with its log-density `[*sample_shape, B]`, at no extra cost.

        One dimension at a time; every draw has its own randomness.
        """

        def draw(
            hidden: jax.Array, inputs: tuple[jax.Array, ...], shape: Sequence[int] = ()
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # hidden: first layer of [z * m_i, m_i, c], [*shape, B, h]
            key, first_z, first_m, output, bias = inputs
            conditional = _mixture(self._head.network.after_first(hidden) @ output + bias[0])
            z = conditional.sample(key, shape)  # [*sample_shape, B]
            return hidden + z[..., None] * first_z + first_m, (z, conditional.log_prob(z))

        keys = jax.random.split(key, self._head.event_size)
        per_dimension = (keys, self._first_z, self._first_m, self._output, self._output_bias)
        first, rest = (jax.tree.map(lambda a, part=part: a[part], per_dimension) for part in (0, slice(1, None)))
        # p(z_1 | c) is the same for all draws.
        hidden, (z_first, log_prob_first) = draw(self._from_context, first, tuple(sample_shape))
        _, (z, log_prob) = jax.lax.scan(draw, hidden, rest)
        z = jnp.concatenate([z_first[None], z])
        return jnp.moveaxis(z, 0, -1), log_prob_first + log_prob.sum(0)  # over dimensions


def _mixture(parameters: jax.Array) -> dist.Distribution:
    """`[..., 3K]` (K logits, K means, K scales) -> one-dimensional mixtures with batch shape `[...]`."""
    logits, loc, scale = jnp.split(parameters, 3, axis=-1)
    components = dist.Normal(loc, jax.nn.softplus(scale) + _MIN_SCALE, **_UNCHECKED)
    return _GaussianMixture(dist.Categorical(logits=logits, **_UNCHECKED), components, **_UNCHECKED)


class _GaussianMixture(dist.MixtureSameFamily):
    """One-dimensional, and sampled with two random numbers for a draw, where NumPyro draws from every component."""

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        key_component, key_noise = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        below = jnp.cumsum(self.mixing_distribution.probs[..., :-1], axis=-1)
        component = (jax.random.uniform(key_component, shape)[..., None] >= below).sum(-1, keepdims=True)
        chosen = component == jnp.arange(self.mixture_size)
        gaussians = self.component_distribution
        loc, scale = (jnp.where(chosen, a, 0.0).sum(-1) for a in (gaussians.loc, gaussians.scale))
        return loc + scale * jax.random.normal(key_noise, shape)


class IdentityGaussian(nnx.Module):
    """Independent Normals over the data with means Linear(features) and one learned scale: covariance scale^2 times the
    identity. The log scale starts at 0. The name follows the published configs."""

    def __init__(self, features_shape: Shape, data_shape: Shape, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(math.prod(features_shape), math.prod(data_shape), rngs=rngs)
        self.log_scale = nnx.Param(jnp.zeros(()))
        self.data_shape = data_shape

    def __call__(self, features: jax.Array) -> ExplicitDistribution:
        """Maps features `[B, ...]` to Normals with batch shape `[B, *data_shape]`."""
        loc = self.linear(_flat(features)).reshape(-1, *self.data_shape)
        return dist.Normal(loc, jnp.exp(self.log_scale[...]), **_UNCHECKED)


class SharedScaleGaussian(nnx.Module):
    """Independent Normals whose means are the features themselves, with one learned scale (log scale starts at 0)."""

    def __init__(self, features_shape: Shape, data_shape: Shape):
        _require_data_shape("SharedScaleGaussian", "means", features_shape, data_shape)
        self.log_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, features: jax.Array) -> ExplicitDistribution:
        """Maps features `[B, *data_shape]` to Normals of the same batch shape."""
        return dist.Normal(features, jnp.exp(self.log_scale[...]) + _MIN_SCALE, **_UNCHECKED)


class Bernoulli(nnx.Module):
    """The features are the logits of independent Bernoulli variables; data in [0, 1]."""

    def __init__(self, features_shape: Shape, data_shape: Shape):
        _require_data_shape("Bernoulli", "logits", features_shape, data_shape)

    def __call__(self, features: jax.Array) -> ExplicitDistribution:
        """Maps features `[B, *data_shape]` to Bernoulli variables of the same batch shape."""
        return dist.Bernoulli(logits=features, **_UNCHECKED)


def _require_data_shape(head: str, meaning: str, features_shape: Shape, data_shape: Shape) -> None:
    if tuple(features_shape) != tuple(data_shape):
        raise UserError(
            f"a {head} decoder takes the network's output as {meaning}: its shape {tuple(features_shape)} differs "
            f"from the data's, {tuple(data_shape)}: adapt the decoder"
        )


def standard_normal(event_size: int) -> dist.Distribution:
    """The prior p(z) = N(0, I) over `[event_size]`."""
    return _diagonal(jnp.zeros(event_size), jnp.ones(event_size))


def diagonal_mixture(logits: jax.Array, loc: jax.Array, scale: jax.Array) -> Mixture:
    """sum_c pi_c N(loc_c, diag(scale_c^2)) over `[e]`: logits of pi `[K]`, loc and scale `[K, e]`."""
    return dist.MixtureSameFamily(dist.Categorical(logits=logits, **_UNCHECKED), _diagonal(loc, scale), **_UNCHECKED)


def kl_to_standard_normal(q: Distribution) -> jax.Array:
    """KL(q || N(0, I)) in nats, `[B]`, for the Gaussian heads: (tr S + m^T m - e - log det S) / 2.

    Raises:
        UserError: `q` is not Gaussian, so there is no closed form.
    """
    if isinstance(q, dist.MultivariateNormal):
        variance, log_scale = jnp.square(q.scale_tril).sum(-1), jnp.log(triangular.diagonal(q.scale_tril))
    elif isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
        variance, log_scale = q.variance, jnp.log(q.base_dist.scale)
    else:
        raise UserError("the posterior must be DiagonalGaussian or TriLGaussian: the ELBO needs its KL in closed form")
    return 0.5 * (variance + jnp.square(q.mean) - 1.0).sum(-1) - log_scale.sum(-1)  # sums over e


class _TriLNormal(dist.MultivariateNormal):
    """A MultivariateNormal whose log-density uses `triangular.solve`, which is faster than JAX's solvers."""

    def log_prob(self, value: jax.Array) -> jax.Array:
        difference = value - self.loc
        scale_tril = jnp.broadcast_to(self.scale_tril, (*difference.shape, difference.shape[-1]))
        noise = triangular.solve(scale_tril, difference)
        log_determinant = jnp.log(triangular.diagonal(self.scale_tril)).sum(-1)
        return _standard_log_prob(noise) - log_determinant


def _standard_log_prob(noise: jax.Array) -> jax.Array:
    return standard_normal(noise.shape[-1]).log_prob(noise)


def kl_divergence(q: dist.Distribution, p: dist.Distribution) -> jax.Array:
    """KL(q || p) in nats, `[...]`, for a diagonal Gaussian q over `[..., e]` and a diagonal or full-covariance p."""
    if not isinstance(p, dist.MultivariateNormal):
        return dist.kl_divergence(q, p)
    # With p = N(m, L L^T) and q = N(n, S^2): (||L^-1 S||^2 + |L^-1 (n - m)|^2 - e) / 2 + log det L - log det S.
    scale, inverse = q.base_dist.scale, triangular.inverse(p.scale_tril)
    trace = jnp.square(inverse * scale[..., None, :]).sum((-2, -1))
    distance = jnp.square((inverse * (q.mean - p.mean)[..., None, :]).sum(-1)).sum(-1)
    log_determinants = jnp.log(triangular.diagonal(p.scale_tril) / scale).sum(-1)  # over e
    return 0.5 * (trace + distance - q.event_shape[0]) + log_determinants


def sample_and_log_prob(
    q: Distribution, key: jax.Array, sample_shape: Sequence[int] = ()
) -> tuple[jax.Array, jax.Array]:
    """Draws z `[*sample_shape, B, e]` from `q` and returns it with its log-density `[*sample_shape, B]` in nats."""
    if isinstance(q, AutoregressiveMixture):
        return q.sample_and_log_prob(key, sample_shape)
    if isinstance(q, dist.MultivariateNormal):
        noise = jax.random.normal(key, q.shape(sample_shape))  # its log-density needs no triangular solve
        log_determinant = jnp.log(triangular.diagonal(q.scale_tril)).sum(-1)
        return q.loc + jnp.einsum("...ij,...j->...i", q.scale_tril, noise), _standard_log_prob(noise) - log_determinant
    z = q.sample(key, sample_shape)
    return z, q.log_prob(z)


def entropy(q: Distribution, key: jax.Array, num_samples: int) -> jax.Array:
    """Entropy of `q` in nats, `[B]`: in closed form for Gaussians, else by Monte Carlo with `num_samples` draws."""
    if isinstance(q, dist.Distribution):
        return q.entropy()
    return -sample_and_log_prob(q, key, (num_samples,))[1].mean(0)


def mean(q: Distribution, key: jax.Array, num_samples: int) -> jax.Array:
    """Mean of `q`, `[B, e]`: exact for Gaussians, else the mean of `num_samples` draws."""
    return q.mean if isinstance(q, dist.Distribution) else q.sample(key, (num_samples,)).mean(0)


def _diagonal(loc: jax.Array, scale: jax.Array) -> dist.Distribution:
    return dist.Independent(dist.Normal(loc, scale, **_UNCHECKED), 1, **_UNCHECKED)


def _bias(linear: nnx.Linear) -> nnx.Param[jax.Array]:
    assert linear.bias is not None  # every layer here has one
    return linear.bias


def _flat(features: jax.Array) -> jax.Array:
    return features.reshape(features.shape[0], -1)


LATENT_HEADS = {
    "DiagonalGaussian": DiagonalGaussian,
    "TriLGaussian": TriLGaussian,
    "AutoregressiveGMM": AutoregressiveGMM,
}
LIKELIHOOD_HEADS = {
    "IdentityGaussian": IdentityGaussian,
    "SharedScaleGaussian": SharedScaleGaussian,
    "Bernoulli": Bernoulli,
    "Columns": ColumnsLikelihood,
}
