"""What several test files make and compare arrays with."""

import numpy as np

Z_LIMIT = 5.0  # standard errors that a statistic may be off


def softplus(a):
    """log(1 + exp(a))."""
    return np.logaddexp(0.0, a)


def normal(seed, *shape):
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
