"""Scores, schedules, pictures and baselines against loops and values worked out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.runs import refusal
from posterior_matching.evaluation import baselines, metrics
from posterior_matching.evaluation.metrics import finite_mean, nrmse
from posterior_matching.evaluation.pictures import image_square, imputation_grid, save_png
from posterior_matching.training import optimizer
from posterior_matching.training.clustering import clustering_scores
from posterior_matching.training.corruption import distort

# NRMSE


def naive_nrmse(x, imputation, scored):
    ratios = []
    for i in range(x.shape[1]):
        known = [value for value in x[:, i] if not np.isnan(value)]
        errors = [(x[n, i] - imputation[n, i]) ** 2 for n in range(len(x)) if scored[n, i] and not np.isnan(x[n, i])]
        mean = sum(known) / len(known)
        std = (sum((value - mean) ** 2 for value in known) / len(known)) ** 0.5
        if errors and std > 0:
            ratios.append((sum(errors) / len(errors)) ** 0.5 / std)
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_nrmse_equals_loops(missing):
    rng = np.random.default_rng(0)
    x, imputation = rng.normal(size=(40, 5)) * np.arange(1, 6), rng.normal(size=(40, 5))
    x[rng.uniform(size=x.shape) < missing] = np.nan
    scored = (rng.uniform(size=x.shape) < 0.4).astype(np.float32)
    np.testing.assert_allclose(nrmse(x, imputation, scored), naive_nrmse(x, imputation, scored), rtol=1e-10)


def test_nrmse_of_the_mean_is_one_in_any_units_and_leaves_out_what_is_constant_or_never_scored(recwarn):
    x = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 10.0, 1e-3] + [0.0, 100.0, 5.0]
    assert nrmse(x, np.broadcast_to(x.mean(0), x.shape), np.ones_like(x)) == pytest.approx(1.0)
    assert nrmse(x, x, np.ones_like(x)) == 0.0
    assert np.isnan(nrmse(x, x, np.zeros_like(x))) and not recwarn.list
    x = np.array([[0.1, 1.0, 5.0], [0.1, 3.0, 7.0], [0.1, 5.0, 9.0]], np.float32)
    scored = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]])
    assert nrmse(x, np.zeros_like(x), scored) == pytest.approx(1.0 / np.std([1.0, 3.0, 5.0]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0, 6.0], (3.0, 0)), ([1.0, np.nan, np.inf, -np.inf, 2.0], (1.5, 3)), ([np.nan], (np.nan, 1))],
)
def test_finite_mean_leaves_out_and_counts_what_is_not_finite(values, expected):
    np.testing.assert_equal(finite_mean(np.array(values, np.float32)), expected)


# Schedules


CYCLE, GAS = {"period": 10, "delay": 3}, {"period": 50_000, "delay": 1000}  # of pm_vae_gas
SCHEDULES = [  # schedule and its values, by hand
    (optimizer.constant(), {7: 1.0}),
    (optimizer.constant(0.3), {0: 0.3, 9: 0.3}),
    (optimizer.cyclic(0.0, 1.0, **CYCLE), {0: 0.0, 2: 0.0, 3: 0.0, 4: 0.2, 7: 0.8, 8: 1.0, 10: 1.0, 12: 1.0}),
    (optimizer.cyclic(0.0, 1.0, **CYCLE), {13: 0.0, 14: 0.2, 18: 1.0, 22: 1.0, 23: 0.0}),
    (
        optimizer.cyclic(0.5, 2.0, period=4, delay=5),
        {0: 0.0, 4: 0.0, 5: 0.5, 6: 1.25, 7: 2.0, 8: 2.0, 9: 0.5, 10: 1.25},
    ),
    # The rise over half of an odd period is rounded down.
    (optimizer.cyclic(0.0, 1.0, period=5, delay=1), dict(enumerate([0, *[0, 0.5, 1, 1, 1] * 2, 0]))),
    (optimizer.cyclic(1.0, 3.0, period=3, delay=0), dict(enumerate([1, 3, 3, 1, 3, 3, 1]))),
    (optimizer.cyclic(0.0, 1.0, **GAS), {999: 0.0, 1000: 0.0, 13_500: 0.5, 26_000: 1.0, 50_999: 1.0, 51_000: 0.0}),
    (optimizer.monotonic(0.0, 1.0, 30_000, 200_000), {0: 0.0, 30_000: 0.0, 130_000: 0.5, 200_000: 0.85, 230_000: 1.0}),
    (optimizer.monotonic(2.0, 1.0, 0, 4), {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.25, 4: 1.0, 5: 1.0}),
]


@pytest.mark.parametrize(("schedule", "by_hand"), SCHEDULES)
def test_schedules_at_steps_worked_out_by_hand(schedule, by_hand):
    steps, expected = list(by_hand), pytest.approx(list(by_hand.values()), abs=1e-6)
    assert jax.jit(schedule)(jnp.array(steps)).tolist() == expected
    assert [float(schedule(step)) for step in steps] == expected  # of Python's numbers, too


def test_a_cycle_must_have_a_rise_and_a_plateau():
    message = refusal(optimizer.build_schedule, {"name": "cyclic", "low": 0.0, "high": 1.0, "period": 1, "delay": 0})
    assert message == "period must be at least 2, not 1"


# Pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_imputation_grid_shows_original_observed_part_and_imputations_of_each_image_in_a_row(channels):
    rng = np.random.default_rng(0)
    x, b = rng.uniform(size=(3, 4, 5, channels)), rng.integers(0, 2, (3, 4, 5, 1))
    imputations = rng.uniform(size=(2, 3, 4, 5, channels))
    imputations[0, 0, 0, 0], imputations[1, 0, 0, 0] = -1.0, 2.0
    grid = imputation_grid(x, b, imputations)
    assert grid.shape == (3 * 6, 4 * 7, channels)  # images of 4 x 5 and gaps of 2
    for n in range(3):
        row = grid[6 * n : 6 * n + 4]
        np.testing.assert_array_equal(grid[6 * n + 4 : 6 * n + 6], 1.0)
        observed = np.where(b[n] == 1, x[n], 0.5)
        for m, expected in enumerate([x[n], observed, *np.clip(imputations[:, n], 0.0, 1.0)]):
            np.testing.assert_array_equal(row[:, 7 * m : 7 * m + 5], expected)
            np.testing.assert_array_equal(row[:, 7 * m + 5 : 7 * m + 7], 1.0)


def test_images_without_masks_are_laid_out_as_a_square_in_order():
    x = np.arange(16).reshape(16, 1, 1, 1) * np.ones((1, 3, 2, 1)) / 16
    grid = image_square(x)
    assert grid.shape == (4 * 5, 4 * 4, 1)
    np.testing.assert_array_equal(grid[::5, ::4, 0], np.arange(16).reshape(4, 4) / 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png_enlarges_by_a_whole_factor_and_keeps_the_colours(channels, tmp_path):
    image = np.random.default_rng(0).uniform(size=(3, 4, channels))
    image[0, 0], image[0, 1] = 0.0, 1.0
    save_png(tmp_path / "a.png", image, min_width=10)  # 4 pixels become 12
    saved = np.asarray(Image.open(tmp_path / "a.png"))
    assert saved.shape == ((9, 12) if channels == 1 else (9, 12, 3)) and saved.dtype == np.uint8
    pixels = saved.reshape(3, 3, 4, 3, channels)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(pixels[:, i, :, j], np.round(255 * image))


# Baselines


def test_baselines_fill_only_what_is_missing_by_mean_nearest_neighbours_and_regression():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 1))
    train = z * [1.0, 2.0, -1.0] + 0.05 * rng.normal(size=(400, 3)) + [0.0, 5.0, 1.0]
    x = train[:6] + 0.01
    holes = x.copy()
    holes[0, 1] = holes[1, 0] = holes[2, 2] = holes[3, 1] = np.nan
    filled = {name: impute(holes) for name, impute in baselines.fit(train).items()}
    assert set(filled) == {"mean", "knn", "iterative"}
    known = ~np.isnan(holes)
    for result in filled.values():
        np.testing.assert_array_equal(result[known], holes[known])
    np.testing.assert_allclose(filled["mean"][~known], np.broadcast_to(train.mean(0), x.shape)[~known])
    for n, i in np.argwhere(~known):
        others = [j for j in range(3) if j != i]
        nearest = np.argsort(np.square(train[:, others] - holes[n, others]).sum(1))[:5]
        assert filled["knn"][n, i] == pytest.approx(train[nearest, i].mean())
        # The iterative imputer's ridge regression is as good as least squares here.
        design = np.column_stack([np.ones(len(train)), train[:, others]])
        weights = np.linalg.lstsq(design, train[:, i])[0]
        assert filled["iterative"][n, i] == pytest.approx(weights @ [1.0, *holes[n, others]], abs=0.02)


def test_costly_baselines_see_evenly_spaced_rows_and_features_never_seen_keep_their_place():
    train = np.stack([np.arange(10.0), np.arange(10.0), np.full(10, np.nan)], axis=1)
    imputers = baselines.fit(train, max_rows=5)  # rows 0, 2, 4, 6, 8: mean 4
    filled = {name: impute(np.array([[np.nan, 3.0, np.nan]])) for name, impute in imputers.items()}
    assert filled["mean"][0, 0] == pytest.approx(4.5)
    assert filled["knn"][0, 0] == pytest.approx(4.0)  # 5 of 5 neighbours
    assert all(values.shape == (1, 3) and np.isfinite(values).all() for values in filled.values())


# PSNR, precision and recall ----------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_definition():
    x = np.random.default_rng(0).uniform(size=(3, 4, 5, 2))
    y = x + np.array([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(metrics.psnr(x, y)[:2], [20.0, 40.0], rtol=1e-6)
    assert metrics.psnr(x, y)[2] == np.inf


def test_a_curve_has_the_published_slopes_and_limits():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    precision, recall = metrics.precision_recall_curve(p, q, num_angles=101)
    np.testing.assert_allclose([precision[50], recall[50]], np.minimum(p, q).sum(), atol=1e-9)  # slope 1: the overlap
    slopes = np.tan(np.linspace(1e-10, np.pi / 2 - 1e-10, 101))
    np.testing.assert_allclose(precision, slopes * recall, atol=1e-6)
    assert precision[-1] == pytest.approx(0.75)  # share of q on the support of p
    assert recall[0] == pytest.approx(1.0)  # all of p's support is within q's
    for other, score in ((p, 1.0), (np.array([0.0, 0.0, 1.0]), 0.0)):  # equal and disjoint histograms
        curve = metrics.precision_recall_curve(p, other)
        assert [metrics.max_f_score(*curve, beta) for beta in (1 / 8, 8)] == pytest.approx([score, score])


def test_samples_that_miss_a_mode_lose_recall_and_samples_outside_lose_precision():
    rng = np.random.default_rng(0)
    modes = 10 * np.eye(4)
    data = np.repeat(modes, 100, axis=0) + 0.1 * rng.standard_normal((400, 4))
    fewer = np.repeat(modes[:2], 200, axis=0) + 0.1 * rng.standard_normal((400, 4))
    outside = np.concatenate([data[::2], np.full((200, 4), 30.0) + 0.1 * rng.standard_normal((200, 4))])

    def scores(generated):
        curve = metrics.precision_recall(data, generated, 0, num_clusters=5, num_runs=3)
        return metrics.max_f_score(*curve, 1 / 8), metrics.max_f_score(*curve, 8)

    precision, recall = scores(data[rng.permutation(400)])
    assert precision > 0.99 and recall > 0.99
    precision, recall = scores(fewer)
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.05)  # F_8 of (1, 1/2)
    precision, recall = scores(outside)
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.95


def test_f_scores_interpolate_between_precision_and_recall():
    precision, recall = np.array([0.9, 0.2]), np.array([0.1, 0.6])
    assert metrics.max_f_score(precision[:1], recall[:1], 1.0) == pytest.approx(2 * 0.09 / 1.0)
    assert metrics.max_f_score(precision, recall, 1e-6) == pytest.approx(0.9)
    assert metrics.max_f_score(precision, recall, 1e6) == pytest.approx(0.6)


# Clustering


@pytest.mark.parametrize("num_clusters", [2, 4, 5])
def test_clustering_accuracy_is_that_of_the_best_of_all_assignments(num_clusters):
    rng = np.random.default_rng(num_clusters)
    label = rng.integers(0, 4, 60)
    cluster = np.where(rng.uniform(size=60) < 0.6, (label + 1) % num_clusters, rng.integers(0, num_clusters, 60))
    slots = [*range(4), *[-1] * max(0, num_clusters - 4)]  # a cluster in slot -1 has no label
    best = max(np.mean(np.array(a)[cluster] == label) for a in itertools.permutations(slots, num_clusters))
    assert clustering_scores(label, cluster)["clustering_accuracy"] == pytest.approx(best)


def test_clustering_scores_do_not_depend_on_names_and_know_perfect_and_useless_clusters():
    label = np.repeat([3, 0, 7], 20)
    perfect = {"clustering_accuracy": 1.0, "nmi": 1.0, "ari": 1.0}
    assert clustering_scores(label, np.repeat([5, 2, 4], 20)) == pytest.approx(perfect)
    useless = {"clustering_accuracy": 1 / 3, "nmi": 0.0, "ari": 0.0}
    assert clustering_scores(label, np.zeros(60, int)) == pytest.approx(useless)


def test_nmi_and_ari_by_hand():
    """Labels 0 0 1 1, clusters 0 0 0 1: I = H(c) - H(c | l) = log 4 - 3/4 log 3 - 1/2 log 2."""
    found = clustering_scores(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
    entropy_cluster = np.log(4) - 0.75 * np.log(3)
    information = entropy_cluster - 0.5 * np.log(2)
    assert found["nmi"] == pytest.approx(information / np.mean([np.log(2), entropy_cluster]))
    # One pair of two is together in both; 3 pairs of 6 are in clusters, 2 in labels: expected 1, at most 2.5.
    assert found["ari"] == pytest.approx((1 - 1) / (2.5 - 1))
    assert found["clustering_accuracy"] == 0.75


# Distortion


def test_distortion_moves_pixels_as_its_random_map_says():
    x = jnp.float32(np.random.default_rng(0).uniform(size=(3, 7, 9, 2)))
    np.testing.assert_allclose(distort(jax.random.key(0), x, 0.0), x, atol=1e-6)
    # A linear ramp stays one: bilinear interpolation is exact for it, away from the border.
    rows, columns = np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21), indexing="ij")
    ramp = jnp.float32(np.stack([rows, columns], -1))[None]  # its channels are the coordinates
    many = np.asarray(distort(jax.random.key(1), jnp.tile(ramp, (500, 1, 1, 1)), 0.1), np.float64)
    inner = many[:, 8:13, 8:13].reshape(500, 25, 2)
    u = np.stack([rows, columns], -1)[8:13, 8:13].reshape(25, 2)
    design = np.concatenate([u, np.ones((25, 1))], -1)
    fits = np.stack([np.linalg.lstsq(design, image, rcond=None)[0] for image in inner])  # [500, 3, 2]
    np.testing.assert_allclose(np.einsum("pk,nkc->npc", design, fits), inner, atol=1e-4)
    deviations = fits - np.eye(3)[:, :2]
    assert np.abs(deviations.mean(0)).max() < 5 * 0.1 / np.sqrt(500)
    np.testing.assert_allclose(deviations.std(0), 0.1, rtol=5 / np.sqrt(2 * 500))
    correlations = np.corrcoef(deviations.reshape(500, 6).T) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(500)  # images are distorted independently, so are coefficients
