"""Code that only speed asks for gives what the plain computation gives."""

import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import normal
from helpers.configs import ROOT
from helpers.scripts import finish, spawn
from posterior_matching import numerics

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_materialise_changes_neither_value_nor_gradient(backend, shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jnp.asarray(normal(0, *shape))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.square(numerics.materialise(x)).sum()))(x)
    np.testing.assert_allclose(value, np.square(x).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


TWICE = """
import resource
import numpy as np
from posterior_matching.numerics.memory import keep_freed_memory

keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**31 + 2**28, np.int8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_kept_also_beyond_two_gigabytes():
    """Page faults of allocating it once, and again."""
    first, again = map(int, finish(spawn([sys.executable, "-c", TWICE], ROOT))[0].split())
    assert again < first / 10
