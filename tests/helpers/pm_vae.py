"""PM-VAEs: one in closed form, and small ones of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from numpyro import distributions as dist

from helpers.configs import LEAST
from posterior_matching.models import build
from posterior_matching.models.vae import PosteriorMatchingVAE


class Exact:
    """A linear-Gaussian model, x = W z + mean + noise: everything in closed form, in float64."""

    def __init__(self, w=None):
        rng = np.random.default_rng(0)
        self.w = rng.normal(size=(4, 2)) if w is None else np.array(w)
        self.mean, self.sigma = rng.normal(size=len(self.w)), 0.5
        self.covariance = self.w @ self.w.T + self.sigma**2 * np.eye(len(self.w))

    def log_prob(self, x, observed):
        """Log p(x_o) of one example; 0 where nothing is observed."""
        o = np.flatnonzero(observed)
        covariance = self.covariance[np.ix_(o, o)]
        return scipy.stats.multivariate_normal.logpdf(x[o], self.mean[o], covariance) if len(o) else 0.0

    def conditional(self, x, observed):
        """Mean and covariance of all of x given x_o."""
        o = np.flatnonzero(observed)
        gain = self.covariance[:, o] @ np.linalg.inv(self.covariance[np.ix_(o, o)])
        return self.mean + gain @ (x - self.mean)[o], self.covariance - gain @ self.covariance[o]

    def model(self, widen=1.0):
        """A PosteriorMatchingVAE that is this model; its posteriors are exact but for covariances times `widen`."""
        (d, e), config = self.w.shape, {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": self.w.shape[1]}
        model = nnx.eval_shape(
            lambda: PosteriorMatchingVAE(
                input_shape=(d,),
                latent_dim=e,
                encoder=config,
                posterior={"name": "TriLGaussian"},
                decoder=config,
                likelihood={"name": "IdentityGaussian"},
                rngs=nnx.Rngs(0),
            )
        )
        vae, head = model.vae, model.vae.likelihood_head
        head.linear.kernel, head.linear.bias = nnx.Param(jnp.float32(self.w.T)), nnx.Param(jnp.float32(self.mean))
        head.log_scale = nnx.Param(jnp.float32(np.log(self.sigma)))
        w, mean, sigma = jnp.float32(self.w), jnp.float32(self.mean), self.sigma

        def posterior(x, b, rngs=None):  # noqa: ARG001
            precision = jnp.eye(e) + jnp.einsum("de,bd,df->bef", w, b, w) / sigma**2
            covariance = jnp.linalg.inv(precision)
            loc = jnp.einsum("bef,df,bd->be", covariance, w, b * (x - mean)) / sigma**2
            return dist.MultivariateNormal(loc, covariance_matrix=widen * covariance)

        def posterior_with_feature(x, b, i):
            def given(value):
                shape = (len(value), x.shape[1])
                return posterior(jnp.broadcast_to(x, shape).at[:, i].set(value[:, 0]), b.at[:, i].set(1.0))

            return given

        posterior.with_feature = posterior_with_feature
        vae.encoder = lambda x, rngs=None: x  # noqa: ARG005
        vae.posterior_head = lambda x: posterior(x, jnp.ones_like(x))
        vae.decoder = lambda z, rngs=None: z  # noqa: ARG005
        model.partial_posterior = posterior
        return model


MLP = {"name": "ResidualMLP", "residual_blocks": 1, "hidden_units": 12}
GMM = {"name": "AutoregressiveGMM", "num_components": 3, "residual_blocks": 1, "hidden_units": 12}
ENCODER = {"name": "ConvEncoder", "conv_layers": ((4, 3, 1), (4, 3, 2), (8, 4, 1))}
KINDS = {
    "tabular": (
        (5,),
        {
            "encoder": MLP,
            "posterior": {"name": "TriLGaussian"},
            "decoder": MLP,
            "likelihood": {"name": "IdentityGaussian"},
            "partial_posterior": GMM,
        },
    ),
    "grey": (
        (8, 8, 1),
        {
            "encoder": ENCODER,
            "posterior": {"name": "DiagonalGaussian"},
            "decoder": {"name": "ConvDecoder", "conv_layers": ((6, 4, 1), (4, 3, 2), (1, 3, 1))},
            "likelihood": {"name": "Bernoulli"},
            "partial_posterior": GMM,
        },
    ),
    "rgb": (
        (8, 8, 3),
        {
            "encoder": ENCODER,
            "posterior": {"name": "TriLGaussian"},
            "decoder": {"name": "ConvDecoder", "conv_layers": ((6, 4, 1), (4, 3, 2), (3, 3, 1))},
            "likelihood": {"name": "Bernoulli"},
            "partial_encoder": MLP,
        },
    ),
}
each_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def example(kind, batch=4, seed=0):
    """Data in [0, 1] and masks with about half observed."""
    shape, _ = KINDS[kind]
    rng = np.random.default_rng(seed)
    b = rng.integers(0, 2, (batch, *shape[:2], 1) if len(shape) == 3 else (batch, *shape))
    return jnp.float32(rng.uniform(size=(batch, *shape))), jnp.float32(b)


# Its posteriors are diagonal: every feature tells about one dimension of z.
ALIGNED = Exact([[0.2, 0], [0.5, 0], [1.5, 0], [0, 0.35], [0, 0.8], [0, 2.5]])


def lookahead_on(model, exact):
    """An untrained lookahead posterior on a model of `Exact`."""
    d, e = exact.w.shape
    encoder = {"name": "ResidualMLP", "residual_blocks": 1, "hidden_units": 64}
    config = {"pm_vae": LEAST | {"latent_dim": e}, "lookahead_encoder": encoder}
    lookahead = build("lookahead", config, (d,), nnx.Rngs(0))
    lookahead.pm_vae = model
    return lookahead


def masks_and_data(n=24):
    rng = np.random.default_rng(3)
    b = rng.uniform(size=(n, 6)) < 0.4
    b[:4] = False
    x = rng.normal(size=(n, 2)) @ ALIGNED.w.T + ALIGNED.mean + ALIGNED.sigma * rng.normal(size=(n, 6))
    return jnp.float32(x), jnp.float32(b)


def mutual_information(x, b):
    """I(z; x_i | x_o) in closed form, -inf where observed."""
    _, covariance = ALIGNED.conditional(np.asarray(x), np.asarray(b))
    gains = 0.5 * np.log(np.diag(covariance) / ALIGNED.sigma**2, where=np.asarray(b) == 0, out=np.full(6, -np.inf))
    return gains
