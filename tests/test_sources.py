"""The paper's tables from small files in the formats of their archives: preprocessing, and the Gaussian check."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flax import nnx
from PIL import Image
from scipy.stats import multivariate_normal

from helpers.configs import DIAGONAL, MLP
from helpers.runs import refusal
from posterior_matching import data
from posterior_matching.data import gaussian, maf, tfds
from posterior_matching.evaluation import uci
from posterior_matching.evaluation.examples import Evaluation
from posterior_matching.models.vae import PosteriorMatchingVAE

BUILDERS = {name: tfds.tabular_builder(name) for name in tfds.TABULAR}


def preprocess(name, *files):
    return BUILDERS[name].preprocess(BUILDERS[name], files)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(BUILDERS["bsds"], "ROWS", (1000, 50, 80))
    monkeypatch.setattr(maf, "fetch", unreachable)


def unreachable(*_):
    raise ConnectionError("no network here")


def manual(name):
    folder = Path(os.environ["TFDS_DATA_DIR"]) / "downloads" / "manual" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Files in the original formats ---------------------------------------------------------------------------------------


def power_text(num_rows=300):
    """The text, and its complete rows [N, 8]: the seven values and the minute of the day."""
    rng = np.random.default_rng(1)
    names = "Global_active_power;Global_reactive_power;Voltage;Global_intensity;"
    lines = [f"Date;Time;{names}Sub_metering_1;Sub_metering_2;Sub_metering_3"]
    complete = []
    for row in range(num_rows):
        minute = (1044 + 7 * row) % 1440
        values = np.round([*rng.uniform(0, 5, 2), rng.normal(240, 3), *rng.uniform(0, 20, 4)], 2)
        cells = [f"{v:.3f}" for v in values]
        if row % 20 == 3:
            cells = ["?"] * 6 + [""]  # as in the original
        else:
            complete.append([*values, minute])
        lines.append(";".join([f"{1 + row // 96}/12/2006", f"{minute // 60:02}:{minute % 60:02}:00", *cells]))
    return "\r\n".join(lines) + "\r\n", np.array(complete)


def gas_text(num_rows=400):
    """The text, and its 16 sensors; eight of them are to be dropped."""
    rng = np.random.default_rng(2)
    sensors = np.cumsum(rng.normal(size=(num_rows, 16)), axis=0)
    for column in (9, 7, 6, 4, 2, 1, 0):
        sensors[:, column] = 3 * sensors[:, column + 1] + 0.01 * rng.normal(size=num_rows)
    sensors[:, 15] = 5000 + sensors[:, 12] + 0.01 * rng.normal(size=num_rows)
    sensors[:, 14] = -sensors[:, 13]  # a negative correlation does not count
    sensors = sensors.round(2)
    lines = ["Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)"]
    for row, values in enumerate(sensors):
        lines.append(f"{row / 100:.2f}   0.00\t20.00  " + " ".join(f"{v:.2f}" for v in values) + " ")
    return "\n".join(lines) + "\n", sensors


DISCRETE = (5, 9, 13, 17, 21)  # number of jets, b-tags


def hepmass_text(num_rows, seed):
    """The text, whose header has one name less than there are columns, and the rows [N, 28]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, 28)) * 2 + 1
    x[:, 0] = rng.integers(0, 2, num_rows)
    for column in DISCRETE:
        x[:, column] = rng.choice([-1.0, 0.5, 1.5], num_rows)
    x[:40, 3] = x[:, 3].max()  # occurs often too, but is not the smallest
    buffer = io.StringIO()
    np.savetxt(buffer, x, delimiter=",", header="# label," + ",".join(f"f{i}" for i in range(26)), comments="")
    return buffer.getvalue(), x


def miniboone_text(num_signals=200, num_background=90):
    """The text, and all events [N, 50]."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(num_signals + num_background, 50)).round(6)
    x[:, [3, 8, 11, 20, 33, 41, 49]] = rng.integers(0, 4, (len(x), 7))  # repeated
    x[[5, 17, 150, 230]] = -999
    lines = [f" {num_signals} {num_background}", *("  " + "  ".join(f"{v:.6e}" for v in row) for row in x)]
    return "\n".join(lines) + "\n", x


def photographs(seed=5):
    rng = np.random.default_rng(seed)
    found = {}
    for name in [*(f"train/{i}" for i in range(20)), *(f"test/{i}" for i in range(4))]:
        shape = (14, 20, 3) if rng.integers(2) else (20, 14, 3)
        smooth = np.cumsum(rng.normal(0, 6, shape), axis=0) + 128
        found[name] = np.clip(smooth, 0, 255).astype(np.uint8)
    return found


def write_photographs(path, found):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in [("BSDS300/iids_train.txt", b"1\n2\n"), ("BSDS300/images/train/._0.txt", b"")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, image in found.items():
            jpeg = io.BytesIO()
            Image.fromarray(image).save(jpeg, "jpeg", quality=95)
            info = tarfile.TarInfo(f"BSDS300/images/{name}.jpg")
            info.size = jpeg.tell()
            jpeg.seek(0)
            archive.addfile(info, jpeg)


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write(name, form):
    """Writes a dataset into the folder for files brought by hand, in one of the forms that are accepted."""
    folder = manual(name)
    if name == "bsds":
        write_photographs(folder / "BSDS300-images.tgz", photographs())
        return folder
    hepmass = {"1000_train.csv": (600, 3), "1000_test.csv": (200, 4)}
    texts = {
        "power": lambda: {"household_power_consumption.txt": power_text()[0]},
        "gas": lambda: {"ethylene_CO.txt": gas_text()[0]},
        "hepmass": lambda: {file: hepmass_text(*arguments)[0] for file, arguments in hepmass.items()},
        "miniboone": lambda: {"MiniBooNE_PID.txt": miniboone_text()[0]},
    }[name]()
    if name == "hepmass" and form != "text":
        texts = {f"{file}.gz": gzip.compress(text.encode()) for file, text in texts.items()}
    archive = {
        ("power", "new"): "individual+household+electric+power+consumption.zip",
        ("power", "old"): "household_power_consumption.zip",
        ("gas", "new"): "gas+sensor+array+under+dynamic+gas+mixtures.zip",
        ("gas", "old"): "data.zip",
        ("hepmass", "new"): "hepmass.zip",
        ("miniboone", "new"): "miniboone+particle+identification.zip",
    }.get((name, form))
    if archive:
        zipped(folder / archive, **{"other.txt": "other"}, **{f"data/{file}": text for file, text in texts.items()})
    else:
        for file, text in texts.items():
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# What they must give, step by step as published ----------------------------------------------------------------------


def tenths(x):
    test = x[-int(0.1 * len(x)) :]
    rest = x[: -int(0.1 * len(x))]
    return rest[: -int(0.1 * len(rest))], rest[-int(0.1 * len(rest)) :], test


def many(column):
    """Whether the smallest value occurs more than five times, by counting all of them."""
    counts = Counter(column)
    return sorted(counts.items())[0][1] > 5


def expected_power():
    x = power_text()[1]
    rng = np.random.RandomState(42)
    rng.shuffle(x)
    x = x[:, [0, 2, 4, 5, 6, 7]]
    noise = np.zeros_like(x)
    noise[:, 1] = 0.01 * rng.rand(len(x))
    noise[:, 0] = 0.001 * rng.rand(len(x))
    noise[:, 2:5] = rng.rand(len(x), 3)
    return x + noise


def test_power():
    write("power", "old")
    parts = preprocess("power", manual("power") / "household_power_consumption.zip")
    x = expected_power()
    assert [part.shape for part in parts] == [(232, 6), (25, 6), (28, 6)] and parts[0].dtype == np.float32
    fitted = np.concatenate(parts[:2])
    np.testing.assert_allclose(fitted.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(fitted.std(0), 1, atol=1e-5)
    for found, part in zip(parts, tenths(x), strict=True):
        reference = (part - x[: len(fitted)].mean(0)) / x[: len(fitted)].std(0)
        np.testing.assert_allclose(found[:, :5], reference[:, :5], atol=1e-5)
        # The noise on the time of day is our own: uniform in one minute, and so a hundredth of the spread at most.
        assert np.abs(found[:, 5] - reference[:, 5]).max() < 2 / x[:, 5].std()
    assert len(np.unique(fitted[:, 5])) == len(fitted)


def test_gas():
    write("gas", "old")
    parts = preprocess("gas", manual("gas") / "data.zip")
    sensors = gas_text()[1]
    left = list(range(16))
    while True:
        correlation = np.array([[np.corrcoef(sensors[:, i], sensors[:, j])[0, 1] for j in left] for i in left])
        remove = [i for row, i in enumerate(left) if (correlation[row] > 0.98).sum() > 1]
        if not remove:
            break
        left.remove(remove[0])
    assert len(left) == 8 and {3, 5, 8, 10, 13, 14, 15} <= set(left)
    assert [part.shape for part in parts] == [(81, 8), (9, 8), (10, 8)] and parts[0].dtype == np.float32
    x = np.concatenate(parts)  # a quarter of the rows, each at most once, up to shift and scale
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0, ddof=1), 1, atol=1e-5)
    sensors = sensors[:, left]
    chosen = nearest_rows(x, sensors)
    assert len(set(chosen)) == 100 and chosen != sorted(chosen)
    picked = sensors[chosen]
    np.testing.assert_allclose(x, (picked - picked.mean(0)) / picked.std(0, ddof=1), atol=1e-3)


def nearest_rows(x, raw):
    """The rows of `raw` of which `x` is a standardised subset: the affine map of each column follows from ranks."""
    scaled = None
    mean, std = raw.mean(0), raw.std(0)
    for _ in range(20):  # alternate between the assignment and the map
        scaled = (raw - mean) / std
        chosen = [int(((scaled - row) ** 2).sum(1).argmin()) for row in x]
        mean, std = raw[chosen].mean(0), raw[chosen].std(0, ddof=1)
    return chosen


@pytest.mark.parametrize("form", ["text", "old", "new"])
def test_hepmass(form):
    folder = write("hepmass", form)
    train, val, test = preprocess("hepmass", *sorted(folder.iterdir()))
    rows = [hepmass_text(*arguments)[1] for arguments in ((600, 3), (200, 4))]
    x, held_out = (part[part[:, 0] == 1][:, 1:27] for part in rows)  # neither the label nor the last feature
    kept = [column for column in range(26) if column + 1 not in DISCRETE]
    assert len(kept) == 21 and kept == [column for column in range(26) if not many(x[:, column])]
    mean, std = x[:, kept].mean(0), x[:, kept].std(0, ddof=1)
    cut = len(x) - int(0.1 * len(x))
    np.testing.assert_allclose(train, (x[:cut, kept] - mean) / std, atol=1e-5)
    np.testing.assert_allclose(val, (x[cut:, kept] - mean) / std, atol=1e-5)
    np.testing.assert_allclose(test, (held_out[:, kept] - mean) / std, atol=1e-5)


def test_hepmass_reads_the_first_tenth(monkeypatch):
    read, asked = pd.read_csv, []

    def read_less(*arguments, nrows, **options):
        asked.append(nrows)
        return read(*arguments, nrows=90, **options)

    monkeypatch.setattr(pd, "read_csv", read_less)
    folder = write("hepmass", "old")
    parts = preprocess("hepmass", *sorted(folder.iterdir()))
    assert asked == [700_000, 350_000]
    assert len(parts[0]) + len(parts[1]) == (hepmass_text(600, 3)[1][:90, 0] == 1).sum()


def test_miniboone():
    write("miniboone", "old")
    parts = preprocess("miniboone", manual("miniboone") / "MiniBooNE_PID.txt")
    x = miniboone_text()[1][:200]
    x = np.delete(x, [5, 17, 150], axis=0)
    x = x[:, [column for column in range(50) if not many(x[:, column])]]
    assert x.shape == (197, 43)
    fitted = x[: 197 - 19]
    for found, part in zip(parts, tenths(x), strict=True):
        np.testing.assert_allclose(found, (part - fitted.mean(0)) / fitted.std(0), atol=1e-5)


def test_bsds():
    folder = write("bsds", "")
    parts = preprocess("bsds", folder / "BSDS300-images.tgz")
    assert [part.shape for part in parts] == [(1000, 63), (50, 63), (80, 63)]
    grey = {}
    with tarfile.open(folder / "BSDS300-images.tgz") as archive:
        for name in photographs():
            rgb = np.asarray(Image.open(archive.extractfile(f"BSDS300/images/{name}.jpg")), float)
            windows = np.lib.stride_tricks.sliding_window_view(np.rint(rgb @ [0.299, 0.587, 0.114]), (8, 8))
            grey[name] = windows.reshape(-1, 64)
    where = {}
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        last = -part.sum(1, keepdims=True)  # a patch has mean 0
        x = 256 * np.concatenate([part, last], axis=1)
        found = []
        for row in x:  # the noise is in [0, 1), so the patch of origin differs by a constant and less than 1
            spread = {name: np.ptp(row - patches, axis=1) for name, patches in grey.items()}
            name = min(spread, key=lambda name: spread[name].min())
            assert spread[name].min() < 1.01 and np.partition(spread[name], 1)[1] > 1.01  # that one alone
            found.append((name, int(spread[name].argmin())))
        assert len(set(found)) == len(found), "a patch twice"
        where[split] = {name for name, _ in found}
        counts = Counter(name for name, _ in found).values()
        assert max(counts) - min(counts) <= 1
        assert [name for name, _ in found] != sorted(name for name, _ in found)
    assert len(where["train"]) == 18 and len(where["val"]) == 2 and not where["train"] & where["val"]
    assert where["test"] == {f"test/{i}" for i in range(4)}


def test_the_published_numbers_of_rows_follow_from_those_of_the_archives():
    def sizes(num_rows):
        return tuple(len(part) for part in maf.last_tenths(np.empty((num_rows, 0))))

    assert sizes(2_049_280) == BUILDERS["power"].ROWS  # complete rows
    assert sizes(round(4_208_261 / 4)) == BUILDERS["gas"].ROWS
    assert sizes(36_499 - 11) == BUILDERS["miniboone"].ROWS
    signals = sum(BUILDERS["hepmass"].ROWS[:2])
    assert signals - int(0.1 * signals) == BUILDERS["hepmass"].ROWS[0]


# From the archive to the dataset -------------------------------------------------------------------------------------

FORMS = [(name, form) for name in BUILDERS for form in ("old", "new", "text")]
FORMS = [pair for pair in FORMS if pair[0] != "bsds"] + [("bsds", "old")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_prepared_from_every_form_of_the_archive(name, form, capsys, caplog):
    folder = write(name, form)
    used = sorted(folder.iterdir())
    with caplog.at_level("WARNING", logger="absl"):
        found = [data.load(name, split).x for split in ("train", "val", "test")]
    for x, expected in zip(found, preprocess(name, *used), strict=True):
        assert x.shape[1] == BUILDERS[name].NUM_FEATURES
        np.testing.assert_array_equal(x, expected)
    out = capsys.readouterr().out
    measured = data.gaussian_check(name).measured
    assert f"preparing '{name}' from {used[-1] if len(used) == 1 else ''}" in out
    assert f"Gaussian fitted to the training rows of {name}: {measured:.2f} nats (published: " in out
    assert name == "bsds" or f"but {BUILDERS[name].ROWS[0]} in the published" in caplog.text
    assert f"these are not the published data of '{name}'" in caplog.text  # indeed
    assert sorted(folder.iterdir()) == used


def test_text_files_come_first_then_archives_then_the_network(monkeypatch):
    asked = []

    def fetch(url, path):
        asked.append((url[:24], path.name))
        np.savetxt(path, np.full((20, 6), 3.0))

    monkeypatch.setattr(maf, "fetch", fetch)
    folder = write("power", "old")
    prepared = Path(os.environ["TFDS_DATA_DIR"]) / "power"
    assert data.load("power", "test").x.std() > 0
    shutil.rmtree(prepared)
    for split in ("train", "val", "test"):
        np.savetxt(folder / f"{split}.txt", np.full((20, 6), 2.0))
    assert (data.load("power", "test").x == 2).all() and not asked
    shutil.rmtree(folder), shutil.rmtree(prepared)
    folder.mkdir()
    assert (data.load("power", "test").x == 3).all()
    assert asked == [("https://drive.google.com", f"{split}.txt") for split in ("train", "val", "test")]


def test_offline_one_line_names_every_file_that_would_do():
    line = refusal(data.load, "hepmass", "train")
    assert "drive.google.com: no network here, archive.ics.uci.edu: no network here" in line
    assert f"put into '{manual('hepmass')}' train.txt (https://drive.google.com/" in line
    csv = ("1000_train.csv.gz and https://archive.ics.uci.edu/", "1000_test.csv.gz; or https")
    assert all(name in line for name in (*csv, "hepmass.zip; or "))
    assert line.endswith("; or 1000_train.csv and 1000_test.csv")


def test_if_google_drive_fails_the_archive_is_downloaded(monkeypatch):
    asked = []

    def fetch(url, path):
        asked.append(url.split("/")[-1])
        if "ml/machine" not in url:
            unreachable()
        write("power", "old")
        assert path.exists()

    monkeypatch.setattr(maf, "fetch", fetch)
    assert len(data.load("power", "test")) == 28
    assert asked[1:] == [url.split("/")[-1] for (url,) in BUILDERS["power"].ARCHIVES[:2]]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("power", "household_power_consumption.zip", b"<html>moved</html>", "cannot read .*not a zip file"),
        ("power", "household_power_consumption.txt", b"<html>moved</html>\n", "cannot read"),
        ("power", "household_power_consumption.txt", b"", "cannot read .*No columns"),
        ("gas", "ethylene_CO.txt", b"Time\n0 0 0 1 2 3\n", "cannot read"),
        ("miniboone", "MiniBooNE_PID.txt", b"many few\n1 2\n", "cannot read .*many"),
        ("miniboone", "MiniBooNE_PID.txt", b"5 5\n" + b"1 2 3\n" * 10, "must have 43 finite numbers a row"),
        ("bsds", "BSDS300-images.tgz", b"\x1f\x8b garbage", "cannot read"),
    ],
)
def test_what_is_not_the_archive_gives_one_line(name, file, content, message):
    (manual(name) / file).write_bytes(content)
    line = refusal(data.load, name, "train")
    assert re.search(message, line) and file in line


@pytest.mark.parametrize("name", ["power", "bsds", "hepmass"])
def test_a_truncated_archive_gives_one_line(name):
    for path in write(name, "new").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = refusal(data.load, name, "train")
    assert "cannot read" in line and "delete it to download it again" in line


def test_archives_without_the_member():
    zipped(manual("gas") / "data.zip", **{"ethylene_methane.txt": "other"})
    assert re.search(r"no ethylene_CO\.txt in '.*data\.zip'", refusal(data.load, "gas", "train"))
    write_photographs(manual("bsds") / "BSDS300-images.tgz", {"train/0": np.zeros((20, 20, 3), np.uint8)})
    assert "has 1 and 0 .jpg files" in refusal(data.load, "bsds", "train")


# The Gaussian --------------------------------------------------------------------------------------------------------


def test_the_gaussian_is_that_of_scipy(monkeypatch):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5))
    train, test = ((rng.normal(size=(n, 5)) @ mixing + 100).astype(np.float32) for n in (1000, 301))
    monkeypatch.setattr(gaussian, "_ROWS", 300)  # several chunks, the last of one row
    fitted = multivariate_normal(train.astype(float).mean(0), np.cov(train.astype(float).T, bias=True))
    found = gaussian.gaussian_log_likelihood(train, test)
    np.testing.assert_allclose(found, fitted.logpdf(test.astype(float)).mean(), rtol=1e-9)
    assert gaussian.gaussian_log_likelihood(train[:, [0, 0]], test[:, [0, 0]]) == -np.inf


@pytest.mark.parametrize(("measured", "warned"), [(-7.3, False), (-8.2, False), (-7.2, True), (np.nan, True)])
def test_more_than_half_a_nat_apart_is_a_warning(measured, warned, caplog, capsys):
    with caplog.at_level("WARNING", logger="absl"):
        gaussian.GaussianCheck("power", measured, -7.74).report()
    assert f"{measured:.2f} nats (published: -7.74)" in capsys.readouterr().out
    assert ("not the published data" in caplog.text) == warned


def test_only_the_five_tables_are_checked_and_are_prepared_for_it():
    assert data.gaussian_check("digits") is None and data.gaussian_check("mixture") is None
    write("miniboone", "old")
    assert np.isfinite(data.gaussian_check("miniboone").measured)


def test_the_evaluation_repeats_the_check(tmp_path, monkeypatch, capsys):
    write("power", "old")
    source = data.open_source(data.DataOptions("power", "train", "validation"))
    run = Evaluation(tmp_path / "run", {}, "best", source, source.split("test"))
    parts = {"encoder": MLP, "posterior": DIAGONAL, "decoder": MLP, "likelihood": {"name": "IdentityGaussian"}}
    model = PosteriorMatchingVAE(input_shape=(6,), latent_dim=2, **parts, rngs=nnx.Rngs(0))
    monkeypatch.setattr(Evaluation, "model", model)
    monkeypatch.setattr(uci.Options, "open_run", lambda *_, **__: run)
    capsys.readouterr()
    uci.evaluate(run.path, num_samples=2, num_trials=1)
    measured = data.gaussian_check("power").measured
    line = f"Gaussian fitted to the training rows of power: {measured:.2f} nats (published: -7.74)"
    assert line in capsys.readouterr().out
    saved = json.loads((run.path / "uci_results" / "results.json").read_text())
    assert saved["metrics"]["gaussian_ll_nats"]["trials"] == [measured]
