"""The shortcuts that only speed asks for give what the plain computation gives."""

import gc
import platform
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.arrays import normal
from helpers.configs import ROOT
from helpers.scripts import finish, spawn
from posterior_matching import numerics
from posterior_matching.numerics import compilation, initial, random
from posterior_matching.numerics.gelu import gelu

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_first_argmin_is_the_first_index_of_the_least_value():
    values = np.random.default_rng(0).integers(0, 3, (50, 4, 6)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(numerics.first_argmin(jnp.asarray(values)), values.argmin(-1))
    values[0, 0], values[1, 1] = np.inf, np.nan
    found = np.asarray(numerics.first_argmin(jnp.asarray(values)))
    assert found[0, 0] == 0 and 0 <= found[1, 1] < 6


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 24, 100])
def test_map_in_cache_maps(backend, rows, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    a, b = normal(0, 5, rows, 3), normal(1, 5)
    found = jax.jit(lambda a, b: numerics.map_in_cache(lambda inputs: inputs[0] * inputs[1], (a, b), rows))(a, b)
    np.testing.assert_array_equal(found, a * b[:, None, None])


@pytest.mark.parametrize("parts", [1, 4, 5, 16])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_split_gives_the_parts_of_array_split(backend, parts, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = normal(0, 19, 3)
    jax.clear_caches()  # split is jitted, and backends differ only here
    found = numerics.split(x, parts)
    jax.clear_caches()
    for part, expected in zip(found, np.array_split(x, parts), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_split_at_gives_parts_of_the_sizes(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, sizes = normal(0, 12, 2), (2, 5, 1, 4)
    jax.clear_caches()
    found = numerics.split_at(x, sizes)
    jax.clear_caches()
    for part, expected in zip(found, np.split(x, np.cumsum(sizes)[:-1]), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="starts are data on CPUs only")
def test_starts_of_a_split_stay_data_when_xla_compiles():
    compiled = (
        jax.jit(lambda x: [jnp.flip(part, 1) for part in numerics.split(x, 12)]).lower(normal(0, 24, 3)).compile()
    )
    assert compiled.as_text().count("dynamic-slice(") == 12


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_concatenate_and_its_gradient_are_those_of_jax(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    parts = [normal(i, 2, n, 3) for i, n in enumerate((1, 4, 4, 2))]
    np.testing.assert_array_equal(numerics.concatenate(parts), np.concatenate(parts, axis=1))
    weights = normal(9, 2, 11, 3)
    gradients = jax.jit(jax.grad(lambda parts: (weights * numerics.concatenate(parts)).sum()))(parts)
    for found, expected in zip(gradients, np.split(weights, [1, 5, 9], axis=1), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="starts are data on CPUs only")
def test_parts_of_a_size_share_the_kernel_that_concatenates_them():
    def joined(parts):
        return numerics.concatenate([jnp.sin(part) for part in parts])

    text = jax.jit(joined).lower([jnp.ones((4, 5, 6))] * 8).compile().as_text()
    kernels = re.findall(r"^%fused_computation\S* (.*?)^}", text, re.MULTILINE | re.DOTALL)
    kernels = [re.sub(r"%[\w.-]+|\w+\.?\w*:|metadata=.*", "", kernel) for kernel in kernels if " sine(" in kernel]
    assert len(kernels) == 8 and len(set(kernels)) <= 2  # the first start is not a sum


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_materialise_changes_neither_value_nor_gradient(backend, shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jnp.asarray(normal(0, *shape))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.square(numerics.materialise(x)).sum()))(x)
    np.testing.assert_allclose(value, np.square(x).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


def test_what_is_materialised_is_not_fused_into_what_uses_it():
    def kernels(between):
        def chain(x):
            for _ in range(6):
                x = between(x + jnp.sin(x))
            return x

        text = jax.jit(chain).lower(jnp.ones((4, 5))).compile().as_text()
        return text[text.index("ENTRY") :].count(" fusion(")

    assert kernels(lambda x: x) == 1 and kernels(numerics.materialise) >= 6


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 4, 7)])
def test_flat_keys_draw_what_jax_draws(shape):
    key = jax.random.fold_in(jax.random.key(3), 7)
    for same in (random.jax.random.key(3), random.wrap_key_data(jax.random.key_data(jax.random.key(3)))):
        flat = jax.random.fold_in(same, 7)
        for draw in (jax.random.normal, jax.random.gumbel, jax.random.bits):
            for a, b in zip(jax.random.split(key), jax.random.split(flat), strict=True):
                np.testing.assert_array_equal(draw(a, shape), draw(b, shape))
        chosen = [jax.random.choice(k, 9, (4,), replace=False) for k in (key, flat)]
        np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("size", [1, 1000, 2047, 2048, 2049, 5000])
def test_keys_of_programs_draw_what_jax_draws_at_any_length(size, partitionable):
    with jax.threefry_partitionable(partitionable):
        keys = (
            jax.random.wrap_key_data(jnp.asarray([1, 2], jnp.uint32)),
            random.wrap_key_data(jnp.asarray([1, 2], jnp.uint32)),
        )
        np.testing.assert_array_equal(*(jax.random.uniform(key, (size,)) for key in keys))
        np.testing.assert_array_equal(*(jax.random.bits(key, (size,), jnp.uint8) for key in keys))
        np.testing.assert_array_equal(*(jax.random.key_data(jax.random.split(key, (size, 2))) for key in keys))


def test_short_draws_of_programs_share_their_kernels():
    def lengths(key):
        text = jax.jit(lambda key: [jax.random.normal(key, (n,)) for n in (3, 70, 900)]).lower(key).as_text()
        return {n for n in (3, 70, 900, 2048) if f"tensor<{n}xui32>" in text}

    data = jnp.zeros(2, jnp.uint32)
    assert lengths(random.jax.random.key(0)) == {3, 70, 900}
    assert 2048 in lengths(random.wrap_key_data(data))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_are_those_of_jax(dtype):
    x = jnp.concatenate([jnp.linspace(-6, 6, 201), jnp.asarray([-1e4, -30.0, 30.0, 1e4])]).astype(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.03, "atol": 0.03}
    for mine, theirs in (
        (gelu, jax.nn.gelu),
        (jax.grad(lambda x: gelu(x).sum()), jax.grad(lambda x: jax.nn.gelu(x).sum())),
    ):
        found, expected = mine(x), theirs(x.astype(jnp.float32))
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, **tolerance)


def test_the_gradient_of_gelu_is_its_slope():
    x, step = np.linspace(-4, 4, 41), 1e-3
    slope = (gelu(jnp.asarray(x + step, jnp.float32)) - gelu(jnp.asarray(x - step, jnp.float32))) / (2 * step)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(jnp.asarray(x, jnp.float32)), slope, atol=1e-3)


def test_initial_keys_differ_and_depend_on_the_first_key():
    def draw(seed):
        keys = initial.InitialKeys(jax.random.key(seed))
        return [tuple(jax.random.key_data(keys.params()).tolist()) for _ in range(20)]

    assert len({*draw(0), *draw(1)}) == 40 and draw(0) == draw(0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1024, 1), (41, 25), (3, 3, 8, 20)])
def test_initial_kernels_are_those_of_flax_drawn_eagerly_or_not(shape):
    key, flax = jax.random.key(3), nnx.initializers.lecun_normal()
    np.testing.assert_array_equal(initial.lecun_normal(key, shape), flax(key, shape, jnp.float32))
    traced = jax.jit(initial.lecun_normal, static_argnums=1)(key, shape)
    np.testing.assert_allclose(traced, flax(key, shape, jnp.float32), rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts memory maps")
def test_programs_are_forgotten_near_the_limit_only():
    compiled = jax.jit(lambda x: 2 * x)
    compiled(1.0)
    compilation.forget_programs_near_the_limit(share=1.0)
    assert compiled._cache_size() == 1
    compilation.forget_programs_near_the_limit(share=0.0)
    assert compiled._cache_size() == 0 and compiled(1.0) == 2.0


def test_garbage_collection_pauses_and_stays_off_where_it_was_off():
    with compilation.without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with compilation.without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


CODE_SIZE = """
import os
if "unrolled" not in os.environ:
import jax
import jax.numpy as jnp

compiled = jax.jit(lambda x: 2 * jnp.tanh(x)).lower(jnp.ones((32, 8, 8, 16))).compile()
print(len(compiled.runtime_executable().serialize()), *os.environ["XLA_FLAGS"].split())
"""


@pytest.mark.process
def test_loops_are_not_unrolled_and_options_of_the_user_stay():
    def size_and_options(**variables):
        size, *options = finish(spawn([sys.executable, "-c", CODE_SIZE], ROOT, **variables))[0].split()
        return int(size), options

    unrolled = size_and_options(XLA_FLAGS="", unrolled="1")[0]
    size, options = size_and_options(XLA_FLAGS="")
    assert size < 0.8 * unrolled and len(options) == 1
    users = "--xla_backend_extra_options=xla_cpu_optimize_for_size"
    smaller, both = size_and_options(XLA_FLAGS=users)
    assert smaller < size and both == [*options, users]


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
