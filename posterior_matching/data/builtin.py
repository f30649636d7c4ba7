"""Datasets that need no download: handwritten digits, samples of a known mixture, natural image patches."""

import functools

import numpy as np

Splits = dict[str, tuple[np.ndarray, np.ndarray | None]]  # split -> (x, label); readers also return x's maximum value


def digits() -> tuple[Splits, float]:
    """scikit-learn's 1,797 handwritten digits, [N, 8, 8, 1] uint8, split 70/10/20 and stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x, label = bunch.images[..., None].astype(np.uint8), bunch.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(x)), test_size=0.2, stratify=label, random_state=0)
    train, val = train_test_split(rest, test_size=0.125, stratify=label[rest], random_state=0)
    return {name: (x[rows], label[rows]) for name, rows in (("train", train), ("val", val), ("test", test))}, 16.0


_DIM, _COMPONENTS, _RANK, _NOISE_VARIANCE = 8, 6, 3, 0.12


@functools.cache
def _mixture_parameters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns weights [K], means [K, d] and covariances [K, d, d] of the mixture.

    Every component is a tilted ellipsoid of rank 3 plus the same isotropic noise, which a decoder with one noise scale
    can represent. Means and scales are chosen so that features have variance about 1 and components overlap.
    """
    rng = np.random.default_rng(2022)
    weights = np.arange(_COMPONENTS, 2 * _COMPONENTS) / np.arange(_COMPONENTS, 2 * _COMPONENTS).sum()
    means = rng.normal(scale=0.7, size=(_COMPONENTS, _DIM))
    factors = rng.normal(scale=np.sqrt(0.4 / _RANK), size=(_COMPONENTS, _DIM, _RANK))
    return weights, means, factors @ factors.transpose(0, 2, 1) + _NOISE_VARIANCE * np.eye(_DIM)


def mixture() -> tuple[Splits, float]:
    """[N, 8] samples of a known mixture of 6 Gaussians with full covariances, whose density is `mixture_log_prob`."""
    weights, means, covariances = _mixture_parameters()
    parts: Splits = {}
    for seed, (name, size) in enumerate({"train": 50_000, "val": 2_000, "test": 2_000}.items()):
        rng = np.random.default_rng(seed)
        component = rng.choice(_COMPONENTS, size=size, p=weights)
        noise = rng.normal(size=(size, _DIM))
        x = means[component] + np.einsum("nij,nj->ni", np.linalg.cholesky(covariances)[component], noise)
        parts[name] = x.astype(np.float32), None
    return parts, 1.0


def mixture_log_prob(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Exact marginal log-density log p(x_o) of the `mixture` dataset, [N] float64 nats; 0 where nothing is observed.

    x and mask (1 = observed) are [N, 8]; unobserved values may be NaN. The conditional is a difference of marginals:
    ``log p(x_u | x_o) = mixture_log_prob(x, ones) - mixture_log_prob(x, mask)``.
    """
    from scipy.special import logsumexp

    x, observed = np.asarray(x, np.float64), np.asarray(mask, bool)
    both_observed = observed[:, :, None] & observed[:, None, :]
    terms = []
    for weight, mean, covariance in zip(*_mixture_parameters(), strict=True):
        # An unobserved feature becomes an independent N(0, 1) at its mode: it adds nothing to the quadratic form or to
        # the determinant, and the constant below counts observed features only.
        difference = np.where(observed, x - mean, 0.0)
        marginal = np.where(both_observed, covariance, np.eye(_DIM))
        quadratic = (difference * np.linalg.solve(marginal, difference[..., None])[..., 0]).sum(-1)
        terms.append(np.log(weight) - 0.5 * (quadratic + np.linalg.slogdet(marginal).logabsdet))
    return logsumexp(terms, axis=0) - 0.5 * np.log(2 * np.pi) * observed.sum(-1)


def patches() -> tuple[Splits, float]:
    """Natural 8x8 grey patches as `patch_features`, cut from disjoint strips of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    # 20 strips of 32 columns, dealt out so that each part sees the whole width of both photographs.
    strips = {"train": [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18], "val": [4, 14], "test": [9, 19]}
    sizes = {"train": 25_000, "val": 2_500, "test": 2_500}  # per photograph
    rng = np.random.default_rng(0)
    parts: Splits = {}
    for name, size in sizes.items():
        cut = []
        for image in load_sample_images().images:
            grey = np.rint(image @ [0.299, 0.587, 0.114])  # [427, 640], integers as in the original data
            regions = grey.reshape(427, 20, 32)[:, strips[name]]
            windows = np.lib.stride_tricks.sliding_window_view(regions, (8, 8), axis=(0, 2))  # [420, strips, 25, 8, 8]
            chosen = rng.choice(np.prod(windows.shape[:3]), size, replace=False)
            cut.append(windows[np.unravel_index(chosen, windows.shape[:3])].reshape(size, 64))
        parts[name] = patch_features(np.concatenate(cut), rng), None
    return parts, 1.0


def patch_features(grey: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The BSDS300 preprocessing of Uria et al. (2013) and later work, of [N, 64] patches with integer values 0..255.

    Returns [N, 63] float32: with uniform noise, scaled to [0, 1], patch mean subtracted, last pixel dropped (minus the
    sum of the others).
    """
    x = (grey + rng.uniform(size=grey.shape)) / 256
    x -= x.mean(axis=1, keepdims=True)
    return x[:, :-1].astype(np.float32)


DATASETS = {"digits": digits, "mixture": mixture, "patches": patches}
