"""Mask generators against their distributions, enumerated by brute force, and the contract that all of them share."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.stats

from posterior_matching import mask_generators, masking
from posterior_matching.errors import UserError
from posterior_matching.mask_generators import (
    BernoulliMaskGenerator,
    CelebAMaskGenerator,
    Cifar10MaskGenerator,
    FixedRectangleMaskGenerator,
    GCFMaskGenerator,
    ImageBernoulliMaskGenerator,
    MixtureMaskGenerator,
    MNISTMaskGenerator,
    OmniglotMaskGenerator,
    RandomPatternMaskGenerator,
    RectangleMaskGenerator,
    SIIDGMMaskGenerator,
    SquareMaskGenerator,
    UniformMaskGenerator,
    build_mask_generator,
    mask_generator_from_spec,
)
from posterior_matching.masking import mask_shape

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(("shape", "shape_of_mask"), [((5,), (5,)), ((4, 3, 1), (4, 3, 1)), ((28, 20, 3), (28, 20, 1))])
def test_shapes_of_masks_and_of_what_models_see(shape, shape_of_mask):
    assert mask_shape(shape) == shape_of_mask
    x, b = jnp.ones((2, *shape)), jnp.ones((2, *shape_of_mask))
    assert masking.partial_input(x, b).shape == (2, *masking.partial_input_shape(shape))


# One of each, with a shape that it fits.
EVERY_GENERATOR = [
    (BernoulliMaskGenerator(0.2), (4,)),
    (UniformMaskGenerator(), (5,)),
    (UniformMaskGenerator((0.0, 0.2)), (16, 16, 1)),
    (ImageBernoulliMaskGenerator(0.2), (2, 2, 1)),
    (RectangleMaskGenerator(), (5, 4, 1)),
    (FixedRectangleMaskGenerator(1, 2, 3, 8), (5, 8, 1)),
    (SquareMaskGenerator(2), (5, 4, 1)),
    (RandomPatternMaskGenerator(max_size=30, resolution=0.3, density=0.3), (7, 5, 1)),
    (MixtureMaskGenerator((BernoulliMaskGenerator(0.0), BernoulliMaskGenerator(1.0)), (3, 1)), (1,)),
    (MNISTMaskGenerator(), (28, 28, 1)),
    (OmniglotMaskGenerator(), (28, 28, 1)),
    (Cifar10MaskGenerator(), (32, 32, 1)),
    (GCFMaskGenerator(), (64, 64, 1)),
    (SIIDGMMaskGenerator(), (64, 64, 1)),
    (CelebAMaskGenerator(), (64, 64, 1)),
]
each_generator = pytest.mark.parametrize(
    ("generator", "event_shape"), EVERY_GENERATOR, ids=[f"{type(g).__name__}-{s}" for g, s in EVERY_GENERATOR]
)

CHUNK = 500
traces = Counter()


@functools.cache
def compiled(generator):
    """Returns `generator` under jit, which counts in `traces` how often it is traced."""

    def traced(key, shape):
        traces[generator, shape] += 1
        return generator(key, shape)

    return jax.jit(traced, static_argnums=1)


def sample(generator, n, event_shape, seed=0):
    """Draws [n, *event_shape] masks as a uint8 numpy array, in batches of one size: compiling takes longest."""
    keys = jax.random.split(jax.random.key(seed), math.ceil(n / CHUNK))
    return np.concatenate([compiled(generator)(key, (CHUNK, *event_shape)).astype(jnp.uint8) for key in keys])[:n]


def assert_distribution(masks, distribution):
    """Asserts that masks follow `distribution`, a dict from the bytes of each possible mask to its probability."""
    assert sum(distribution.values()) == pytest.approx(1)
    counts = Counter(mask.tobytes() for mask in masks)
    assert counts.keys() <= distribution.keys(), "impossible masks"
    expected = np.array([p * len(masks) for p in distribution.values()])
    assert expected.min() > 5, "too few draws for the test"
    observed = [counts[mask] for mask in distribution]
    if len(distribution) > 1:
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-6


def assert_means(values, probabilities):
    """Asserts that the means of 0/1 `values` [n, ...] agree with `probabilities` [...] within 5 standard errors."""
    probabilities = np.broadcast_to(probabilities, values.shape[1:])
    error = np.sqrt(probabilities * (1 - probabilities) / len(values))
    assert np.all(np.abs(values.mean(axis=0, dtype=np.float64) - probabilities) <= 5 * error + 1e-12)


def mix(*weighted):
    """Mixes (weight, distribution) pairs."""
    mixture = Counter()
    for weight, distribution in weighted:
        for mask, p in distribution.items():
            mixture[mask] += p * weight / sum(w for w, _ in weighted)
    return mixture


def bernoulli_distribution(d, p):
    masks = itertools.product((0, 1), repeat=d)
    return {bytes(mask): p ** sum(mask) * (1 - p) ** (d - sum(mask)) for mask in masks}


def subset_distribution(d, sizes):
    masks = itertools.product((0, 1), repeat=d)
    return {bytes(mask): 1 / (len(sizes) * math.comb(d, sum(mask))) for mask in masks if sum(mask) in sizes}


def without(height, width, y1, x1, y2, x2):
    mask = np.ones((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 0
    return mask.tobytes()


def rectangle_distribution(height, width, low, high):
    """Every pair of corner pixels, kept if the area fits; with exact integer arithmetic in tenths."""
    counts = Counter()
    for ya, yb in itertools.product(range(height), repeat=2):
        for xa, xb in itertools.product(range(width), repeat=2):
            y1, y2, x1, x2 = min(ya, yb), max(ya, yb) + 1, min(xa, xb), max(xa, xb) + 1
            if round(10 * low) * height * width <= 10 * (y2 - y1) * (x2 - x1) <= round(10 * high) * height * width:
                counts[without(height, width, y1, x1, y2, x2)] += 1
    return {mask: count / counts.total() for mask, count in counts.items()}


def square_distribution(height, width, size):
    corners = list(itertools.product(range(height - size + 1), range(width - size + 1)))
    return {without(height, width, y, x, y + size, x + size): 1 / len(corners) for y, x in corners}


def halves(dim):
    """The masks without the left, top, right and bottom half."""
    half = dim // 2
    corners = [(0, 0, dim, half), (0, 0, half, dim), (0, half, dim, dim), (half, 0, dim, dim)]
    return [without(dim, dim, *c) for c in corners]


# --- distributions ---


GCF = [(26, 17, 58, 36), (26, 29, 58, 48), (26, 15, 37, 50), (26, 15, 37, 34), (26, 31, 37, 50), (43, 20, 62, 44)]
MIXED = (FixedRectangleMaskGenerator(0, 0, 1, 1), SquareMaskGenerator(2), ImageBernoulliMaskGenerator(0.3))
MIXED_PARTS = ({without(2, 3, 0, 0, 1, 1): 1}, square_distribution(2, 3, 2), bernoulli_distribution(6, 0.3))
DISTRIBUTIONS = [  # generator, event shape, draws, the probability of every mask
    (BernoulliMaskGenerator(0.2), (4,), 20_000, bernoulli_distribution(4, 0.2)),
    (ImageBernoulliMaskGenerator(), (2, 2, 1), 20_000, bernoulli_distribution(4, 0.2)),
    (UniformMaskGenerator(), (5,), 40_000, subset_distribution(5, range(5))),  # something is always unobserved
    (UniformMaskGenerator((0.3, 0.7)), (2, 4, 1), 40_000, subset_distribution(8, range(2, 5))),
    (RectangleMaskGenerator(0.3, 1.0), (5, 4, 1), 40_000, rectangle_distribution(5, 4, 0.3, 1.0)),
    (RectangleMaskGenerator(0.1, 0.6), (4, 4, 1), 40_000, rectangle_distribution(4, 4, 0.1, 0.6)),
    (RectangleMaskGenerator(0.0, 1.0), (1, 6, 1), 40_000, rectangle_distribution(1, 6, 0.0, 1.0)),
    (SquareMaskGenerator(2), (5, 4, 1), 20_000, square_distribution(5, 4, 2)),
    (SquareMaskGenerator(2), (4, 4, 1), 20_000, square_distribution(4, 4, 2)),
    (FixedRectangleMaskGenerator(1, 2, 3, 8), (5, 8, 1), 9, {without(5, 8, 1, 2, 3, 8): 1}),
    (GCFMaskGenerator(), (64, 64, 1), 2000, {without(64, 64, *corners): 1 / 6 for corners in GCF}),
    (MixtureMaskGenerator(MIXED, (1, 0.5, 2)), (2, 3, 1), 200_000, mix(*zip((1, 0.5, 2), MIXED_PARTS, strict=True))),
]


@pytest.mark.parametrize(
    ("generator", "event_shape", "n", "distribution"), DISTRIBUTIONS, ids=[f"{g}-{s}" for g, s, *_ in DISTRIBUTIONS]
)
def test_distribution(generator, event_shape, n, distribution):
    assert_distribution(sample(generator, n, event_shape), distribution)


@pytest.mark.parametrize(
    ("generator", "p", "low", "high"),
    [
        (MNISTMaskGenerator(dim=7), 0.5, 0.3, 1.0),
        (OmniglotMaskGenerator(dim=8), 0.5, 0.1, 0.6),
        (Cifar10MaskGenerator(dim=8), 0.3, 0.1, 0.5),
    ],
    ids=["mnist", "omniglot", "cifar10"],
)
def test_distribution_of_composites(generator, p, low, high):
    """Two parts in ten are pixels, which look like no rectangle."""
    dim = generator.dim
    parts = [(1, {mask: 1}) for mask in halves(dim)]
    parts += [(2, square_distribution(dim, dim, dim // 2)), (2, rectangle_distribution(dim, dim, low, high))]
    rectangles = mix(*parts)
    masks = sample(generator, 100_000, (dim, dim, 1))
    pixels = np.array([mask.tobytes() not in rectangles for mask in masks])
    assert_means(pixels, 0.2)
    assert_means(masks[pixels], p)
    assert_distribution(masks[~pixels], rectangles)


def classify_64(masks):
    """Counts the parts of SIIDGM, GCF or the rectangles that [64, 64, 1] masks come from."""
    known = {without(64, 64, 16, 16, 48, 48): "centre"}
    known |= dict(zip(halves(64), ("left", "top", "right", "bottom"), strict=True))
    names = []
    for mask in masks:
        rows, columns = np.nonzero(mask[..., 0] == 0)
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        share = len(rows) / 4096
        if mask.tobytes() in known:
            names.append(known[mask.tobytes()])
        elif len(rows) == area:
            names.append("rectangle" if share >= 0.3 else "gcf")
        elif 0.2 <= share <= 0.3:
            names.append("pattern")
            assert (mask[1:] != mask[:-1]).mean() < 0.1  # cells are about 17 pixels wide
        else:
            assert abs(share - 0.8) < 0.05
            names.append("pixels")
    return Counter(names)


def test_distribution_of_siidgm_within_celeb_a():
    """One part of the CelebA masks in four is from SIIDGM."""
    proportions = {"pattern": 0.05, "pixels": 0.05, "centre": 0.05, "gcf": 0.25, "rectangle": 0.5}
    proportions |= dict.fromkeys(("left", "top", "right", "bottom"), 0.025)
    n = 1000
    counts = classify_64(sample(CelebAMaskGenerator(), n, (64, 64, 1)))
    assert counts.keys() == proportions.keys()
    for name, p in proportions.items():
        assert abs(counts[name] / n - p) < 5 * math.sqrt(p * (1 - p) / n)


# --- random patterns ---


def test_random_pattern_windows_are_windows_of_whole_patterns():
    generator, _ = EVERY_GENERATOR[7]
    n, height, width = 5000, 7, 5
    masks = sample(generator, n, (height, width, 1))[..., 0]

    @jax.jit
    def whole_pattern_windows(key):
        def one(key):
            noise_key, y_key, x_key = jax.random.split(key, 3)
            pattern = jax.image.resize(jax.random.uniform(noise_key, (9, 9)), (30, 30), method="cubic")
            corner = jax.random.randint(y_key, (), 0, 24), jax.random.randint(x_key, (), 0, 26)
            return jax.lax.dynamic_slice(pattern, corner, (height, width)) >= 0.3

        return jax.vmap(one)(jax.random.split(key, 4 * n))

    reference = np.asarray(whole_pattern_windows(jax.random.key(1)))
    reference = reference[np.abs(1 - reference.mean(axis=(1, 2)) - 0.3) <= 0.05]
    assert len(reference) > 1000

    # The first moments, E b_i, and the second ones, E b_i b_j, agree within 5 standard errors of their difference.
    a, b = (m.reshape(len(m), -1).astype(np.float64) for m in (masks, reference))
    second_a, second_b = a.T @ a / len(a), b.T @ b / len(b)
    error = np.sqrt(second_a * (1 - second_a) / len(a) + second_b * (1 - second_b) / len(b))
    assert np.all(np.abs(second_a - second_b) < 5 * error)


def test_random_pattern_share():
    density = 0.25
    unobserved = 1 - sample(RandomPatternMaskGenerator(), 1000, (64, 64, 1))
    shares = unobserved.mean(axis=(1, 2, 3))
    assert np.all(np.abs(shares - density) <= 0.05 + 1e-6)
    assert shares.std() > 0.01
    # Blobs, not pixel noise: cells are about 17 pixels wide, so that neighbours rarely differ.
    assert np.abs(np.diff(unobserved.astype(int), axis=1)).mean() < 0.05


# --- the contract of every generator ---


def test_every_generator_is_registered_and_tested():
    assert set(mask_generators.MASK_GENERATORS.values()) == {type(generator) for generator, _ in EVERY_GENERATOR}


@each_generator
def test_contract(generator, event_shape):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        masks = jax.eval_shape(lambda key: generator(key, (3, *event_shape)), jax.random.key(0))
    assert (masks.shape, masks.dtype) == ((3, *event_shape), jnp.float32)
    if isinstance(generator, SIIDGMMaskGenerator):
        pytest.skip("a part of CelebAMaskGenerator, and slow to compile")
    draw, shape = compiled(generator), (CHUNK, *event_shape)
    before = traces[generator, shape]
    masks = np.asarray(draw(jax.random.key(3), shape))
    other = np.asarray(draw(jax.random.key(4), shape))
    assert masks.shape == shape
    assert masks.dtype == np.float32
    assert set(np.unique(masks)) == {0.0, 1.0}
    np.testing.assert_array_equal(masks, draw(jax.random.key(3), shape))
    if max(event_shape) < 64:  # others take long when they are not compiled
        np.testing.assert_array_equal(masks, generator(jax.random.key(3), shape))
    assert traces[generator, shape] > 0 and traces[generator, shape] - before <= 1  # one program for all keys
    if isinstance(generator, FixedRectangleMaskGenerator):
        return
    assert (masks != other).any()
    # Examples are independent: a random projection of the masks is uncorrelated between neighbours in the batch.
    values = np.tensordot(masks, np.random.default_rng(0).normal(size=event_shape), axes=len(event_shape))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(len(values))


def test_scan_equals_pmap():
    generator, shape = RandomPatternMaskGenerator(max_size=30, resolution=0.3, density=0.3), (4, 7, 5, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    _, scanned = jax.lax.scan(lambda carry, key: (carry, generator(key, shape)), 0, keys)
    old_keys = jax.random.key_data(keys[:1])
    np.testing.assert_array_equal(jax.pmap(lambda key: generator(key, shape))(old_keys), scanned[:1])
    assert (scanned[0] != scanned[1]).any()


# --- errors and configs ---


@pytest.mark.parametrize(
    ("generator", "event_shape", "remedy"),
    [
        (BernoulliMaskGenerator(1.5), (8,), "p must lie in [0, 1]"),
        (BernoulliMaskGenerator(math.nan), (8,), "p must lie in [0, 1]"),
        (ImageBernoulliMaskGenerator(-0.1), (8, 8, 1), "p must lie in [0, 1]"),
        (UniformMaskGenerator((0.5, 0.5)), (8,), "0 <= l < h <= 1"),
        (UniformMaskGenerator((0.1, 1.5)), (8,), "0 <= l < h <= 1"),
        (UniformMaskGenerator((0.5,)), (8,), "0 <= l < h <= 1"),
        (UniformMaskGenerator((0.0, 0.2)), (4,), "widen"),
        (RectangleMaskGenerator(0.6, 0.3), (8, 8, 1), "widen"),
        (RectangleMaskGenerator(0.51, 0.52), (2, 2, 3), "widen"),
        (FixedRectangleMaskGenerator(0, 0, 9, 4), (8, 8, 1), "inside the image"),
        (FixedRectangleMaskGenerator(-1, 0, 4, 4), (8, 8, 1), "inside the image"),
        (FixedRectangleMaskGenerator(0, 4, 4, 4), (8, 8, 1), "non-empty"),
        (SquareMaskGenerator(9), (8, 12, 1), "1..8"),
        (SquareMaskGenerator(0), (8, 8, 1), "1..8"),
        (RandomPatternMaskGenerator(max_size=60), (64, 64, 3), "at least 64"),
        (RandomPatternMaskGenerator(resolution=0.0), (64, 64, 3), "resolution"),
        (RandomPatternMaskGenerator(density=1.2), (64, 64, 3), "density"),
        (RandomPatternMaskGenerator(), (1, 1, 1), "none of 128 windows"),  # Its share is 0 or 1.
        (RandomPatternMaskGenerator(max_size=64, resolution=1 / 64), (64, 64, 1), "none of 128 windows"),
        (MixtureMaskGenerator((), ()), (8,), "weights"),
        (MixtureMaskGenerator((BernoulliMaskGenerator(),), (1, 1)), (8,), "weights"),
        (MixtureMaskGenerator((BernoulliMaskGenerator(),), (0,)), (8,), "weights"),
        (MNISTMaskGenerator(), (16, 16, 1), "28x28 pixels; set dim"),
        (MNISTMaskGenerator(), (28, 27, 1), "28x28 pixels"),
        (Cifar10MaskGenerator(), (28, 28, 1), "32x32 pixels; set dim"),
        (GCFMaskGenerator(), (32, 32, 3), "64x64 pixels; resize"),
        (CelebAMaskGenerator(), (128, 128, 3), "64x64 pixels; resize"),
    ],
    ids=str,
)
def test_errors(generator, event_shape, remedy):
    with pytest.raises(UserError) as error:
        generator.check(event_shape)
    message = str(error.value)
    assert type(generator).__name__ in message
    assert str(event_shape) in message
    assert remedy in message
    assert "\n" not in message
    with pytest.raises(UserError):  # Drawing checks as well, so that no mask is silently wrong.
        generator(jax.random.key(0), (2, *mask_shape(event_shape)))


def test_mixture_checks_its_parts():
    generator = MixtureMaskGenerator((BernoulliMaskGenerator(), SquareMaskGenerator(9)), (1, 1))
    with pytest.raises(UserError, match=r"^SquareMaskGenerator\(size=9\) does not fit data of shape \(8, 8, 1\)"):
        generator.check((8, 8, 1))
    with pytest.raises(UserError, match=r"^FixedRectangleMaskGenerator\(y1=0, x1=0, y2=1, x2=0\)"):
        MNISTMaskGenerator(dim=1).check((1, 1, 1))


@each_generator
def test_shapes_that_fit(generator, event_shape):
    generator.check(event_shape)
    if len(event_shape) == 3:
        generator.check((*event_shape[:2], 3))  # Colour images are as good,
        with pytest.raises(ValueError, match="one channel"):  # but their masks have one channel.
            generator(jax.random.key(0), (2, *event_shape[:2], 3))
    if generator.images_only:
        with pytest.raises(UserError, match="BernoulliMaskGenerator or UniformMaskGenerator"):
            generator.check((8,))


def test_build():
    mixture = {
        "name": "MixtureMaskGenerator",
        "generators": [{"name": "UniformMaskGenerator", "bounds": [0.1, 0.5]}, {"name": "BernoulliMaskGenerator"}],
        "weights": [1, 2],
    }
    expected = MixtureMaskGenerator((UniformMaskGenerator((0.1, 0.5)), BernoulliMaskGenerator(0.5)), (1, 2))
    for config in (mixture, ml_collections.ConfigDict(mixture)):
        assert build_mask_generator(config) == expected
        assert hash(build_mask_generator(config)) == hash(expected)
    assert mixture["name"] == "MixtureMaskGenerator"  # The config is left as it was.
    uniform = ml_collections.FrozenConfigDict({"name": "UniformMaskGenerator", "bounds": (0.0, 0.2)})
    assert build_mask_generator(uniform) == UniformMaskGenerator((0.0, 0.2))
    assert build_mask_generator({"name": "MNISTMaskGenerator", "dim": 16}) == MNISTMaskGenerator(dim=16)
    assert build_mask_generator({"name": "CelebAMaskGenerator"}) == CelebAMaskGenerator()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "SquareMaskGenerator"}, "missing key 'config.mask_generator.size'"),
        ({"name": "GCFMaskGenerator", "dim": 32}, "unknown key 'config.mask_generator.dim'"),
        ({"name": "OmniglotMaskGenerator", "rectangles": 1}, "unknown key 'config.mask_generator.rectangles'"),
        (
            {
                "name": "MixtureMaskGenerator",
                "generators": [{"name": "BernoulliMaskGenerator", "q": 1}],
                "weights": [1],
            },
            r"unknown key 'config.mask_generator.generators\[0\].q'",
        ),
    ],
)
def test_build_errors(config, message):
    with pytest.raises(UserError, match=message):
        build_mask_generator(config, "config.mask_generator")


# Specifications ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("BernoulliMaskGenerator", BernoulliMaskGenerator()),
        ("BernoulliMaskGenerator:p=0.2", BernoulliMaskGenerator(0.2)),
        ("UniformMaskGenerator:bounds=0.0,0.2", UniformMaskGenerator((0.0, 0.2))),
        ("UniformMaskGenerator:bounds=(0.0, 0.2)", UniformMaskGenerator((0.0, 0.2))),
        ("FixedRectangleMaskGenerator:y1=0,x1=1, y2=4,x2=5", FixedRectangleMaskGenerator(0, 1, 4, 5)),
        (
            "MixtureMaskGenerator:generators=[{'name': 'SquareMaskGenerator', 'size': 4}],weights=[2]",
            MixtureMaskGenerator((SquareMaskGenerator(4),), (2,)),
        ),
    ],
)
def test_a_specification_names_a_generator_and_its_options(spec, expected):
    assert mask_generator_from_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "SquareMaskGenerato:size=4",
            "unknown mask_generator 'SquareMaskGenerato': did you mean 'SquareMaskGenerator'",
        ),
        ("SquareMaskGenerator", r"missing key 'mask_generator.size' \(SquareMaskGenerator takes size\)"),
        (
            "SquareMaskGenerator:sze=4",
            r"'mask_generator.sze': did you mean 'size'\? \(SquareMaskGenerator takes size\)",
        ),
        ("SquareMaskGenerator:size", r"mask_generator.size must be a number, 'text' or a tuple, not ''.*takes size"),
        ("SquareMaskGenerator:size=four", r"mask_generator.size must be a number, 'text' or a tuple, not 'four'"),
        ("SquareMaskGenerator:size=__import__('os').getpid()", "must be a number, 'text' or a tuple"),
        ("SquareMaskGenerator:size=4.5", r"mask_generator.size must be a valid integer, not 4\.5"),
        ("GCFMaskGenerator:dim=64", "'mask_generator.dim'.*GCFMaskGenerator takes no options"),
    ],
)
def test_a_wrong_specification_is_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        mask_generator_from_spec(spec)
    assert "\n" not in str(caught.value)
