"""Datasets by name: built in, TFDS images, the user's own files; and `decode`."""

import dataclasses
import gzip
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from posterior_matching import data
from posterior_matching.data import builtin, cache, source, tfds
from posterior_matching.data.tables import read as tables
from posterior_matching.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MNIST = Path(os.environ.get("TFDS_DATA_DIR", SHARED / "tensorflow_datasets"))
WINE = SHARED / "data" / "winequality-white.csv"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path / "cache"))


def fails(name, split="train", **kwargs):
    """Returns the one-line message with which `load` refuses."""
    with pytest.raises(UserError) as error:
        data.load(str(name), split, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.process
def test_import_is_light():
    heavy = ["jax", "sklearn", "scipy", "tensorflow_datasets", "tensorflow"]
    code = f"import sys, posterior_matching.data; sys.exit(', '.join(set({heavy}) & set(sys.modules)) or None)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Built-in data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "mixture", "patches"])
def test_builtin_splits_are_disjoint_and_repeatable(name):
    splits = {split: data.load(name, split) for split in ("train", "validation", "test")}
    assert [dataset.split for dataset in splits.values()] == ["train", "val", "test"]
    sets = [{row.tobytes() for row in dataset.x} for dataset in splits.values()]
    duplicates = sum(map(len, sets)) - len(set.union(*sets))
    assert duplicates == 0
    for split, dataset in splits.items():
        np.testing.assert_array_equal(data.load(name, split).x, dataset.x)
        assert len(dataset) == len(dataset.x)
    assert "train, val, test" in fails(name, "train[:10%]")


def test_digits():
    splits = [data.load("digits", split) for split in ("train", "val", "test")]
    assert [len(dataset) for dataset in splits] == [1257, 180, 360]
    for dataset in splits:
        assert (dataset.input_shape, dataset.x.dtype, dataset.max_value) == ((8, 8, 1), np.uint8, 16.0)
        assert dataset.label.dtype == np.int32 and dataset.x.max() == 16
        shares = np.bincount(dataset.label, minlength=10) / len(dataset)
        np.testing.assert_allclose(shares, 0.1, atol=0.01)  # stratified: the classes are nearly equal overall


def test_mixture_is_what_a_vae_can_represent():
    weights, means, covariances = builtin._mixture_parameters()
    assert np.isclose(weights.sum(), 1)
    assert np.linalg.eigvalsh(covariances).min() > 0.1
    x = data.load("mixture", "train").x
    assert x.shape == (50_000, 8) and x.dtype == np.float32
    # Moments of the samples against those of the mixture, within 5 standard errors.
    mean = weights @ means
    variance = weights @ (np.diagonal(covariances, axis1=1, axis2=2) + means**2) - mean**2
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(variance.max() / len(x)))
    np.testing.assert_allclose(np.sqrt(variance), 1, atol=0.25)
    np.testing.assert_allclose(x.var(0), variance, rtol=5 * np.sqrt(2 / len(x)))
    # Fixed for ever: published numbers depend on it.
    np.testing.assert_allclose(data.mixture_log_prob(np.zeros((1, 8)), np.ones((1, 8))), -16.21115450769255, rtol=1e-9)


def test_mixture_log_prob_against_scipy():
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    weights, means, covariances = builtin._mixture_parameters()
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(40, 8)), rng.integers(0, 2, size=(40, 8))
    mask[0], mask[1] = 1, 0
    expected = np.zeros(40)
    for row in range(40):
        o = np.flatnonzero(mask[row])
        if len(o):
            terms = [
                multivariate_normal(m[o], c[np.ix_(o, o)]).logpdf(x[row, o])
                for m, c in zip(means, covariances, strict=True)
            ]
            expected[row] = logsumexp(terms, b=weights)
    np.testing.assert_allclose(data.mixture_log_prob(x, mask), expected, rtol=1e-10, atol=1e-10)
    hidden = np.where(mask, x, np.nan)  # what is not observed has no say
    np.testing.assert_allclose(data.mixture_log_prob(hidden, mask), expected, rtol=1e-10, atol=1e-10)


def test_mixture_conditional_integrates_to_one():
    x = np.repeat(data.load("mixture", "test").x[:1].astype(np.float64), 4001, axis=0)
    grid = np.linspace(-12, 12, 4001)
    x[:, 3] = grid
    mask = np.ones_like(x)
    mask[:, 3] = 0
    conditional = data.mixture_log_prob(x, np.ones_like(x)) - data.mixture_log_prob(x, mask)
    assert np.trapezoid(np.exp(conditional), grid) == pytest.approx(1, abs=1e-6)
    mask[:, 5] = 0  # p(x_o) = integral over x_3 of p(x_o, x_3), here with feature 5 missing, too
    with_3 = mask.copy()
    with_3[:, 3] = 1
    marginal = np.log(np.trapezoid(np.exp(data.mixture_log_prob(x, with_3)), grid))
    assert marginal == pytest.approx(data.mixture_log_prob(x, mask)[0], abs=1e-6)


def test_patches():
    splits = [data.load("patches", split).x for split in ("train", "val", "test")]
    assert [x.shape for x in splits] == [(50_000, 63), (5_000, 63), (5_000, 63)]
    for x in splits:
        assert x.dtype == np.float32 and np.abs(x).max() < 1
        last = -x.sum(1)  # the mean of all 64 is zero
        assert np.abs(last).max() < 1
        neighbours = np.corrcoef(x[:, 27], x[:, 28])[0, 1]  # natural images are smooth
        assert neighbours > 0.3


# decode --------------------------------------------------------------------------------------------------------------


def test_decode_under_jit():
    import jax

    decode = jax.jit(data.decode)
    images = np.array([0, 8, 16], np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 4, 5, 2), np.uint8)
    x, available = decode(images, 16.0)
    assert x.dtype == available.dtype == np.float32 and available.shape == (3, 4, 5, 1)
    np.testing.assert_array_equal(x[:, 0, 0, 0], [0, 0.5, 1])
    np.testing.assert_array_equal(available, 1)
    x, available = decode(np.array([[1, np.nan, -2]], np.float32), 1.0)
    np.testing.assert_array_equal(x, [[1, 0, -2]])
    np.testing.assert_array_equal(available, [[1, 0, 1]])


# TFDS images ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (MNIST / "mnist").exists(), reason="MNIST is not prepared")
def test_real_mnist(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(MNIST))
    dataset = data.load("mnist", "validation")
    assert (dataset.split, dataset.x.shape, dataset.x.dtype) == ("test", (10_000, 28, 28, 1), np.uint8)
    assert dataset.max_value == 255.0 and np.bincount(dataset.label).min() == 892  # fives in the MNIST test set
    assert dataset.x.mean() / 255 == pytest.approx(0.1325, abs=1e-4)
    small = data.load("mnist16", "test")
    flat = data.load("mnist16_flat", "test")
    assert small.x.shape == (10_000, 16, 16, 1) and small.x.dtype == np.float32 and small.max_value == 1.0
    assert small.x.min() >= 0 and small.x.max() <= 1
    np.testing.assert_array_equal(flat.x, small.x.reshape(10_000, 256))
    np.testing.assert_array_equal(small.label, dataset.label)
    assert len(data.load("mnist", "test[:50]")) == 50
    assert "train, test" in fails("mnist", "val[:3]")
    assert "tensorflow" not in sys.modules


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_mnist_is_prepared_without_tensorflow(tmp_path, monkeypatch, compress, name):
    import tensorflow_datasets
    from tensorflow_datasets.image_classification import mnist

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), rng.integers(0, 10, 20, dtype=np.uint8)
    asked = []

    def download(self, urls):
        asked.extend(urls.values())
        assert all(url in self._url_infos for url in urls.values())  # the checksums of TFDS's builder are in force
        paths = {key: tmp_path / key for key in urls}
        for key, path in paths.items():
            path.write_bytes(compress(idx(images if "data" in key else labels)))
        return paths

    monkeypatch.setattr(tensorflow_datasets.download.DownloadManager, "download_and_extract", download)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 20)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 20)
    dataset = data.load(name, "train")
    order = [next(i for i, image in enumerate(images) if (image == x[..., 0]).all()) for x in dataset.x]
    assert sorted(order) == list(range(20))  # TFDS shuffles
    np.testing.assert_array_equal(dataset.label, labels[order])
    assert len(asked) == 4
    # Where TFDS itself looks for it, and readable by its own builder.
    assert len(tensorflow_datasets.builder(name, data_dir=tmp_path / "tfds").as_data_source("test")) == 20
    assert "tensorflow" not in sys.modules


def test_malformed_idx_file(tmp_path, monkeypatch):
    import tensorflow_datasets

    def download(_, urls):
        (tmp_path / "page").write_text("<html>gone</html>")
        return dict.fromkeys(urls, tmp_path / "page")

    monkeypatch.setattr(tensorflow_datasets.download.DownloadManager, "download_and_extract", download)
    assert "not an idx file" in fails("mnist")
    assert not (tmp_path / "tfds" / "mnist" / "3.0.1").exists()


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def test_celeb_a_is_cropped_and_halved(monkeypatch):
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (5, 8, 8, 3)).repeat(30, 1).repeat(30, 2)[:, :218, :178].astype(np.uint8)
    faces = tfds._crop_faces(smooth)
    crop = smooth[:, 45:173, 25:153].astype(float)
    halved = (crop[:, ::2, ::2] + crop[:, 1::2, ::2] + crop[:, ::2, 1::2] + crop[:, 1::2, 1::2]) / 4
    assert faces.shape == (5, 64, 64, 3) and faces.dtype == np.uint8
    assert np.abs(faces - halved).max() <= 0.5

    import tensorflow_datasets

    builder, image = tensorflow_datasets.builder_cls("celeb_a"), tensorflow_datasets.features.Image(shape=(218, 178, 3))
    monkeypatch.setattr(
        builder,
        "_info",
        lambda self: tensorflow_datasets.core.DatasetInfo(
            builder=self, features=tensorflow_datasets.features.FeaturesDict({"image": image})
        ),
    )
    examples = [(i, {"image": io.BytesIO(png(x))}) for i, x in enumerate(smooth)]
    monkeypatch.setattr(builder, "_split_generators", lambda *_: {"validation": iter(examples)})
    dataset = data.load("celeb_a", "val")
    assert dataset.split == "validation" and dataset.max_value == 255.0
    assert {x.tobytes() for x in dataset.x} == {x.tobytes() for x in faces}


def test_bilinear_resize_by_hand():
    ramp = np.arange(28, dtype=np.uint8)[None, :, None, None] * np.ones((1, 1, 28, 1), np.uint8)
    out = tfds.resize_bilinear(ramp, 16)[0, :, 0, 0]
    np.testing.assert_allclose(out, (np.arange(16) + 0.5) * 28 / 16 - 0.5, atol=1e-5)  # linear, half-pixel centres
    impulse = np.zeros((1, 28, 28, 1))
    impulse[0, 2, 2] = 1  # between the samples at 0.375, 2.125 and 3.875
    np.testing.assert_allclose(tfds.resize_bilinear(impulse, 16)[0, :3, 1, 0], np.array([0, 0.875, 0]) * 0.875)
    np.testing.assert_array_equal(tfds.resize_bilinear(ramp, 28), ramp)


def test_no_network(monkeypatch, tmp_path):
    import requests
    import tensorflow_datasets

    def download(*_):
        raise requests.exceptions.ConnectionError("HTTPSConnectionPool ... " * 20)

    monkeypatch.setattr(tensorflow_datasets.download.DownloadManager, "download_and_extract", download)
    message = fails("cifar10")
    assert "no network" in message and str(tmp_path / "tfds" / "cifar10") in message


def test_names():
    assert "did you mean mnist" in fails("mnisst")
    assert "digits" in fails("digit")
    assert "own data" in fails("zzzzzzzz")
    assert "no file" in fails("table.parquet")
    columns = data.TableSchema.from_standardisation([0] * 8, [1] * 8).to_json()
    assert "pass a file" in fails("mixture", saved=of_run(columns=columns))


# Own tables ----------------------------------------------------------------------------------------------------------


def own_source(path):
    return data.open_source(data.DataOptions(str(path), "train", "validation"))


def of_run(**saved):
    config = {"dataset": "mine.csv", "train_split": "train", "validation_split": "validation"}
    return {"config": config, "input_shape": [3]} | saved


def table(rows=200, columns=3, seed=0):
    x = np.random.default_rng(seed).normal(5, 3, size=(rows, columns))
    x[::7, 1] = np.nan
    return x


def test_an_own_file_is_split_and_standardised(tmp_path):
    x = table()
    np.save(tmp_path / "t.npy", x)
    own = own_source(tmp_path / "t.npy")
    splits = {split: own.split(split) for split in ("train", "validation", "test", "all")}
    assert [len(d) for d in splits.values()] == [160, 20, 20, 200]
    assert [d.split for d in splits.values()] == ["train", "val", "test", "all"]
    train, whole = splits["train"], splits["all"]
    assert train.x.dtype == np.float32 and train.label is None and train.max_value == 1
    np.testing.assert_allclose(np.nanmean(train.x, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(train.x, 0), 1, atol=1e-5)
    observed = ~np.isnan(x)  # order kept
    np.testing.assert_allclose(own.schema.decode(whole.x).to_numpy()[observed], x[observed], rtol=1e-5)
    rows = [{row.tobytes() for row in splits[s].x} for s in ("train", "validation", "test")]
    assert len(set.union(*rows)) == 200  # disjoint
    np.testing.assert_array_equal(data.load(str(tmp_path / "t.npy"), "train").x, train.x)
    frame = data.load(pd.DataFrame(x), "train")
    np.testing.assert_array_equal(frame.x, train.x)


def test_later_data_are_in_the_units_of_the_run(tmp_path):
    np.save(tmp_path / "t.npy", table())
    own = own_source(tmp_path / "t.npy")
    saved = of_run(**own.to_json())
    few = np.array([[1, 2, 3], [1, np.nan, 4]], np.float32)  # a constant column, and too few rows to split
    np.save(tmp_path / "few.npy", few)
    dataset = data.load(str(tmp_path / "few.npy"), "all", saved)
    mean, std = ([getattr(c, name) for c in own.schema.columns] for name in ("mean", "std"))
    np.testing.assert_allclose(dataset.x, (few - mean) / std, rtol=1e-6)
    assert "too few" in fails(tmp_path / "few.npy", "test", saved=saved)
    np.save(tmp_path / "wide.npy", table(columns=4))
    assert "4 columns, but the run was trained on 3" in fails(tmp_path / "wide.npy", saved=saved)


def test_training_reads_a_file_once(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("a;b;c\n" + "\n".join(f"{i % 7};{i % 5};{'xy'[i % 2]}" for i in range(50)))
    config = {"dataset": str(tmp_path / "t.csv"), "train_split": "train", "validation_split": "validation"}
    read, calls = tables.read_table, []
    monkeypatch.setattr(source, "read_table", lambda *args, **kwargs: calls.append(args) or read(*args, **kwargs))

    def opened(saved=None, **changes):
        return data.open_source(data.DataOptions.of_run({"config": config | changes}), saved)

    first = opened(table={"drop": ("b",), "separator": ";"})
    train, validation = first.split("train"), first.split("validation")
    assert len(calls) == 1 and (len(train), len(validation)) == (40, 5)
    assert [c.name for c in first.schema.columns] == ["a", "c"] and first.fingerprint
    np.testing.assert_array_equal(opened(first.to_json()).split("train").x, train.x)
    with pytest.raises(UserError, match=r"unknown key 'config.table.dropp'"):
        opened(table={"dropp": ("b",)})
    with pytest.raises(UserError, match=r"config.table.separator must be one character"):
        opened(table={"separator": "; "})
    digits = opened(dataset="digits")
    assert digits.schema is None and digits.fingerprint is None


def test_every_key_of_a_table_is_in_the_configs():
    from configs import common

    keys = common.table()
    assert set(keys) == {field.name for field in dataclasses.fields(data.TableOptions)}
    assert data.TableOptions(**keys) == data.TableOptions()


def test_npz(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, rows=table())
    assert len(data.load(str(path), "train")) == 160
    np.savez(path, train=table(50), test=table(20, seed=1))
    assert data.load(str(path), "validation").split == "test"  # as the TFDS datasets without one
    np.savez(path, train=table(50), val=table(10, seed=1), test=table(20, seed=2))
    own = own_source(path)
    splits = [own.split(split) for split in ("train", "validation", "test", "all")]
    assert [len(d) for d in splits] == [50, 10, 20, 80]
    np.testing.assert_allclose([c.mean for c in own.schema.columns], np.nanmean(table(50), 0))
    assert "train, val, test, all" in fails(path, "train[:3]")
    np.savez(path, a=table(), b=table())
    assert "it has a, b" in fails(path)
    np.savez(path, train=table(), test=table(columns=2))
    assert "train 3, test 2" in fails(path)
    np.savez(path, train=table(), test=np.zeros(3))
    assert "'test' has shape [3]" in fails(path)
    path.write_bytes(b"PK\x03\x04" + b"x" * 50)
    assert "cannot read" in fails(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), "2-D"),
        (np.zeros((2, 3, 4, 5, 6)), r"images are numbers, \[N, H, W\]"),
        (np.zeros((0, 3)), "2-D"),
        (np.array([["a", "b"]]), "numbers"),
        (np.zeros((4, 2), complex), "numbers"),
        (np.array([[1, None]], object), "cannot read"),
        (np.where(np.eye(20) > 0, np.inf, 1.0), r"column 1 .*infinite value \(row 1\)"),
        (np.ones((20, 2)), "no column of .* varies"),
        (np.full((20, 1), 0.1), "no column of .* varies"),
    ],
)
def test_bad_npy(tmp_path, array, message):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    assert re.search(message, fails(tmp_path / "t.npy"))


def test_unreadable_files(tmp_path):
    assert "no file" in fails(tmp_path / "t.npy")
    (tmp_path / "t.npy").write_bytes(b"")
    assert "cannot read" in fails(tmp_path / "t.npy")
    (tmp_path / "t.npy").write_bytes(b"\x80\x04 pickle?")
    assert "cannot read" in fails(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", x=table())
    (tmp_path / "t.npz").rename(tmp_path / "t.npy")
    assert ".npz" in fails(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", table())
    (tmp_path / "t.npy").rename(tmp_path / "t.npz")
    assert "cannot read" in fails(tmp_path / "t.npz")
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    assert "an unsupported format: save the table as .csv" in fails(tmp_path / "t.xlsx")


@pytest.mark.skipif(not WINE.exists(), reason="the wine quality table is not here")
def test_wine_quality():
    own = own_source(WINE)
    splits = [own.split(split) for split in ("train", "validation", "test")]
    assert [d.x.shape for d in splits] == [(3920, 12), (489, 12), (489, 12)]
    names = [column.name for column in own.schema.columns]
    assert names[0] == "fixed acidity" and names[-1] == "quality"
    assert not any(np.isnan(d.x).any() for d in splits)
    assert dataclasses.replace(splits[0], name="wine").name == "wine"
    # The published numbers rest on these rows in this order, in these units.
    rows = np.genfromtxt(WINE, delimiter=";", skip_header=1)
    order = np.random.default_rng(0).permutation(len(rows))
    test, validation, train = np.split(rows[order], [489, 978])
    for dataset, part in zip(splits, (train, validation, test), strict=True):
        expected = ((part - train.mean(0)) / train.std(0)).astype(np.float32)
        np.testing.assert_array_equal(dataset.x, expected)


def test_a_user_without_a_home_directory_is_told_where_to_put_the_cache(monkeypatch):
    for name in ("POSTERIOR_MATCHING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="set POSTERIOR_MATCHING_CACHE to a folder"):
        cache.folder()
