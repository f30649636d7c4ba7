"""Images of one's own: every format and fault, splits and labels, what a run keeps, and their imputation."""

import dataclasses
import io
import json
import os
import shutil
import threading
import time
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from helpers.configs import FAMILIES, changed, load, small
from helpers.runs import contents, refusal, rows
from posterior_matching import data, models, runs
from posterior_matching.config import plain
from posterior_matching.data import ImageFormat, ImageOptions
from posterior_matching.data.images import files as image_files
from posterior_matching.data.images.source import fingerprint, is_images, read_images
from posterior_matching.errors import UserError
from posterior_matching.evaluation import uci
from posterior_matching.impute.files import impute
from posterior_matching.impute.imputer import RowImputer
from posterior_matching.models.marginal_likelihood import tempered_weights, weighted_mean
from posterior_matching.models.vdvae import UnitRange

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def warned(monkeypatch):
    """The warnings, as they come."""
    lines = []
    monkeypatch.setattr(image_files.logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def pixels(height=8, width=8, channels=3):
    """Random pixels, one of them black and one white."""
    values = RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)
    values[0, 0], values[0, 1] = 0, 255
    return values


def picture(height=8, width=8):
    return Image.fromarray(pixels(height, width))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of(path, files):
    """Writes files by name: bytes, or images as PNG."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def archive_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else encoded(content))
    return path


def read(source, **options):
    return read_images(source, ImageOptions(**options))


# Formats -------------------------------------------------------------------------------------------------------------

COLOUR = pixels()
GREY = pixels(channels=1)[..., 0]
BLACK_AND_WHITE = np.where(GREY < 128, 0, 255).astype(np.uint8)
LOSSLESS = {
    "rgb.png": (Image.fromarray(COLOUR), "png", COLOUR),
    "rgb.bmp": (Image.fromarray(COLOUR), "bmp", COLOUR),
    "rgb.tiff": (Image.fromarray(COLOUR), "tiff", COLOUR),
    "rgb.webp": (Image.fromarray(COLOUR), "webp", COLOUR),
    "rgb.ppm": (Image.fromarray(COLOUR), "ppm", COLOUR),
    "UPPER.PNG": (Image.fromarray(COLOUR), "png", COLOUR),
    "no_suffix": (Image.fromarray(COLOUR), "png", COLOUR),
    "wrong_suffix.jpg": (Image.fromarray(COLOUR), "png", COLOUR),
    "opaque.png": (Image.fromarray(COLOUR).convert("RGBA"), "png", COLOUR),
    "grey.png": (Image.fromarray(GREY), "png", GREY[..., None]),
    "grey_as_rgb.png": (Image.fromarray(GREY).convert("RGB"), "png", GREY[..., None]),
    "grey.gif": (Image.fromarray(GREY), "gif", GREY[..., None]),
    "bits.png": (Image.fromarray(BLACK_AND_WHITE).convert("1"), "png", BLACK_AND_WHITE[..., None]),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_are_read_exactly(name, tmp_path):
    image, kind, expected = LOSSLESS[name]
    (tmp_path / name).write_bytes(encoded(image, kind, **({"lossless": True} if kind == "webp" else {})))
    found = read(tmp_path)
    assert (found.x.dtype, found.max_value, found.names) == (np.uint8, 255.0, (name,))
    np.testing.assert_array_equal(found.x[0], expected)
    assert found.format == ImageFormat(expected.shape, "uint8", (0.0, 255.0))
    if "." in name:
        np.testing.assert_array_equal(read(tmp_path / name).x, found.x)
    archive = archive_of(tmp_path / "a.zip", {f"inner/{name}": (tmp_path / name).read_bytes()})
    np.testing.assert_array_equal(read(archive).x, found.x)


def test_other_modes_are_near(tmp_path):
    smooth = Image.fromarray(np.linspace(0, 255, 192).reshape(8, 8, 3).astype(np.uint8))
    folder_of(
        tmp_path,
        {
            "jpeg.jpg": encoded(smooth, "jpeg", quality=95),
            "cmyk.jpg": encoded(smooth.convert("CMYK"), "jpeg", quality=95),
            "cmyk.tif": encoded(smooth.convert("CMYK"), "tiff"),
            "palette.png": encoded(smooth.quantize(64)),
        },
    )
    assert np.abs(read(tmp_path).x.astype(int) - np.asarray(smooth)).max() < 40


def test_orientation_alpha_and_animation(tmp_path, warned):
    wide = picture(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    half = np.concatenate([np.asarray(picture(8, 4)), np.full((8, 4, 1), 128, np.uint8)], axis=2)
    frames = [picture(8, 4) for _ in range(3)]
    folder_of(
        tmp_path,
        {
            "turned.png": encoded(wide, exif=exif),
            "half.png": Image.fromarray(half),
            "moving.png": encoded(frames[0], save_all=True, append_images=frames[1:]),
        },
    )
    found = dict(zip((images := read(tmp_path)).names, images.x, strict=True))
    np.testing.assert_array_equal(found["turned.png"], np.rot90(np.asarray(wide), -1))
    np.testing.assert_allclose(found["half.png"], half[..., :3] * (128 / 255) + 255 * (127 / 255), atol=1.01)
    np.testing.assert_array_equal(found["moving.png"], np.asarray(frames[0]))
    assert [line.split("' ")[1] for line in warned] == [
        "are transparent, shown on white (half.png)",
        "are animated or have several pages, of which the first is taken (moving.png)",
    ]
    count = len(warned)
    read(tmp_path)  # from the cache, with the same warnings
    assert warned[count:] == warned[:count]


def test_what_is_no_image_is_counted(tmp_path, warned):
    good = encoded(picture(32, 32))
    folder_of(
        tmp_path / "photos",
        {
            "a.png": good,
            "deep/er/b.png": good,
            "broken.png": good[:60],
            "words.jpg": b"words",
            "empty.png": b"",
            "table.csv": b"a,b\n1,2\n",
            "README": b"words",
            ".DS_Store": b"x",
            "._a.png": b"x",
            "__MACOSX/a.png": b"x",
            ".hidden/a.png": b"x",
            "Thumbs.db": b"x",
        },
    )
    (tmp_path / "photos" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "photos" / "linked.png").symlink_to("a.png")
    (tmp_path / "photos" / "deep" / "loop").symlink_to("..")
    assert read(tmp_path / "photos").names == ("a.png", "deep/er/b.png", "linked.png")
    assert len(warned) == 2 and warned[0].startswith("cannot read 4 of the files of") and "broken.png" in warned[0]
    assert "2 of the files of" in warned[1] and "table.csv" in warned[1]
    assert "cannot read 4 of the files of" in refusal(read_images, tmp_path / "photos", for_imputation=True)


def test_an_archive_is_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    archive = archive_of(tmp_path / "a.zip", {f"{i:02}.png": picture() for i in range(32)})
    whole, reading = zipfile.ZipFile.read, threading.Lock()

    def alone(self, *args):
        assert reading.acquire(blocking=False), "two threads at once: since Python 3.12, zipfile fails then"
        time.sleep(0.002)  # lets the other threads in
        reading.release()
        return whole(self, *args)

    monkeypatch.setattr(zipfile.ZipFile, "read", alone)
    assert len(read(archive).names) == 32


def test_names_in_archives(tmp_path):
    good = encoded(picture())
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = zipfile.ZipFile(tmp_path / "a.zip", "w")
        for name in ("in/a.png", "in/A.png", "in\\b.png", "in/a.png", "__MACOSX/in/a.png", "in/.x.png"):
            archive.writestr(name, good)
        archive.close()
    assert read(tmp_path / "a.zip").names == ("in/A.png", "in/a.png", "in/b.png")
    for name in ("/etc/a.png", "../a.png", "a/../../a.png", "C:/a.png", "..\\a.png"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr(name, good)
        assert "names a file outside of itself" in refusal(read, tmp_path / "bad.zip")


def test_refusals_of_files(tmp_path, monkeypatch):
    def of(name, files, **options):
        return refusal(read, folder_of(tmp_path / name, files), **options)

    (tmp_path / "empty").mkdir()
    assert refusal(read, tmp_path / "empty").endswith("holds no images")
    assert "holds no images: it has t.csv" in of("table", {"t.csv": b"a,b"})
    assert "is a run directory" in of("run", {"config.json": b"{}", "checkpoints/x": b"", "a.png": picture()})
    assert "of 2 files none can be read (a.png: " in of("broken", {"a.png": b"x", "b.png": b"y"})
    sizes = {"a.png": picture(8, 9), "b.png": picture(8, 9), "c.png": picture(9, 8)}
    assert "differ in size ('a.png' is 8x9, 'c.png' is 9x8 pixels): set config.images.size" in of("sizes", sizes)
    message = of("crop", {"a.png": picture()}, crop=(0, 0, 8, 9))
    assert message.startswith("config.images.crop is (0, 0, 8, 9), which does not lie inside 'a.png', which has 8x8")
    assert "more than 1024x1024: set config.images.size" in of("large", {"a.png": Image.new("L", (2000, 1000))})
    dim = Image.fromarray(np.full((8, 8), 4000, np.uint16))
    more = "from 4000 to 4000, more than 8 bits: set config.images.range"
    assert more in of("dim", {"a.png": dim})
    assert more in refusal(read_images, tmp_path / "dim", known=ImageFormat((8, 8, 1)))  # of a run
    real = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert "set config.images.range to (black, white)" in of("float", {"a.tif": encoded(real, "tiff")})
    assert "has values from 4000 to 4000" in of("dim", {}, range=(0, 3000))
    np.testing.assert_array_equal(read(tmp_path / "dim", range=(0, 4000)).x, 255)
    np.testing.assert_array_equal(read(tmp_path / "float", range=(0.0, 1.0)).x, 128)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "none can be read (a.png: Image size (64 pixels) exceeds limit" in of("bomb", {"a.png": picture()})
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04")
    assert "cannot read" in refusal(read, tmp_path / "bad.zip")
    for missing in ("no.zip", "no.png"):
        assert "no file or folder" in refusal(data.load, str(tmp_path / missing), "train")


def test_a_file_that_disappears_or_appears_while_reading(tmp_path, monkeypatch):
    folder_of(tmp_path, {f"{i}.png": picture() for i in range(3)})
    decode = image_files._decode

    def removing(name, *arguments):
        (tmp_path / "2.png").unlink(missing_ok=True)
        return decode(name, *arguments)

    monkeypatch.setattr(image_files, "_decode", removing)
    assert "changed while it was read" in refusal(read, tmp_path)


# Options -------------------------------------------------------------------------------------------------------------


def test_crop_and_size(tmp_path):
    images = {f"{i}.png": picture(20 + i, 30) for i in range(3)}
    folder_of(tmp_path, images)
    cropped = read(tmp_path, crop=(2, 3, 10, 12)).x
    for found, image in zip(cropped, images.values(), strict=True):
        np.testing.assert_array_equal(found, np.asarray(image)[2:12, 3:15])
    assert read(tmp_path, size=16).x.shape == (3, 16, 16, 3)
    # The middle of the longer side: a picture of three parts, of which only the middle one is seen.
    parts = np.repeat(np.array([[0, 128, 255]], np.uint8), 10, axis=1).repeat(10, axis=0)
    folder_of(tmp_path / "parts", {"a.png": Image.fromarray(parts)})
    assert np.ptp(read(tmp_path / "parts", size=10).x) == 0
    # A mean stays a mean: resizing has antialiasing.
    noise = folder_of(tmp_path / "noise", {"a.png": Image.fromarray(pixels(64, 64, 1)[..., 0])})
    small, whole = read(noise, size=8).x, read(noise).x
    assert abs(small.mean() - whole.mean()) < 3 and small.std() < whole.std() / 4


def test_channels(tmp_path):
    folder_of(tmp_path, {"a.png": picture(), "b.png": Image.fromarray(GREY)})
    assert read(tmp_path).x.shape[3] == 3  # of both
    np.testing.assert_array_equal(read(tmp_path).x[1], np.repeat(GREY[..., None], 3, axis=2))
    grey = read(tmp_path, channels=1).x
    assert grey.shape[3] == 1
    np.testing.assert_allclose(grey[0, ..., 0], read(tmp_path).x[0] @ [0.299, 0.587, 0.114], atol=1)
    assert read(tmp_path / "b.png", channels=3).x.shape == (1, 8, 8, 3)
    known = ImageFormat((8, 8, 1))
    assert "1 of the images of" in (m := refusal(read_images, tmp_path, ImageOptions(), known)) and "grey ones" in m
    assert read_images(tmp_path / "b.png", ImageOptions(), ImageFormat((8, 8, 3))).x.shape[3] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "config.images.size must be at least 1"),
        ({"crop": (0, 0, 8)}, "config.images.crop has a wrong number of entries"),
        ({"crop": (-1, 0, 8, 8)}, r"config.images.crop\[0\] must be at least 0"),
        ({"channels": 2}, "config.images.channels must be 1 or 3"),
        ({"range": (1, 0)}, "config.images.range must be .* black below white"),
        ({"sise": 3}, "unknown key 'config.images.sise': did you mean 'size'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        FAMILIES["pm_vae"].parse(plain(load("pm_vae_images")) | {"images": options})


def test_options_are_not_ignored():
    options = data.DataOptions("digits", "train", "val", images=ImageOptions(size=16))
    assert "config.images is for images of your own" in refusal(options.check)


# Splits and labels ---------------------------------------------------------------------------------------------------


def test_splits_by_name_stay_when_images_are_added(tmp_path):
    one = encoded(picture())
    folder_of(tmp_path, {f"{i}.png": one for i in range(400)})
    before = read(tmp_path)
    part_of = {before.names[row]: part for part, rows in before.parts.items() for row in rows}
    sizes = {part: len(rows) for part, rows in before.parts.items()}
    assert sum(sizes.values()) == len(part_of) == 400
    for part in ("val", "test"):
        assert abs(sizes[part] - 40) < 4 * np.sqrt(400 * 0.1 * 0.9)
    folder_of(tmp_path, {f"new{i}.png": one for i in range(50)})
    after = read(tmp_path)
    assert all(part_of.get(after.names[row], part) == part for part, rows in after.parts.items() for row in rows)
    assert after.fingerprint != before.fingerprint
    assert [len(data.load(str(tmp_path), split)) for split in ("train", "validation", "test", "all")] == [
        *(len(after.parts[part]) for part in ("train", "val", "test")),
        450,
    ]


def test_folders_are_labels_or_splits(tmp_path):
    def files(*names):
        return {name: encoded(picture()) for name in names}

    labelled = read(folder_of(tmp_path / "a", files("cats/1.png", "cats/old/2.png", "dogs/3.png")))
    assert labelled.format.labels == ("cats", "dogs") and labelled.label.tolist() == [0, 0, 1]
    assert read(folder_of(tmp_path / "b", files("cats/1.png", "dogs/2.png", "3.png"))).label is None
    assert read(folder_of(tmp_path / "c", files("all/1.png", "all/2.png"))).label is None
    nested = read(archive_of(tmp_path / "c.zip", files("pets/cats/1.png", "pets/dogs/2.png")))
    assert nested.label.tolist() == [0, 1]
    named = folder_of(tmp_path / "d", files("x/Train/cats/1.png", "x/Train/dogs/2.png", "x/valid/dogs/3.png"))
    assert {part: rows.tolist() for part, rows in read(named).parts.items()} == {"train": [0, 1], "val": [2]}
    assert data.load(str(named), "validation").label.tolist() == [1]
    assert "has no split 'test'" in refusal(data.load, str(named), "test")
    folder_of(named, files("x/y.png"))
    assert "'x/y.png' lies next to the folders train, val of" in refusal(read, named)
    vehicles = read(folder_of(tmp_path / "e", files("train/1.png", "car/2.png")))
    assert vehicles.format.labels == ("car", "train") and set(vehicles.parts) == {"train", "val", "test"}
    # A run's labels are those of later images, also of only one of them.
    known = ImageFormat((8, 8, 3), labels=("cats", "dogs"))
    later = folder_of(tmp_path / "f", files("dogs/1.png"))
    assert read_images(later, known=known).label.tolist() == [1]
    assert read_images(folder_of(tmp_path / "g", files("cows/1.png")), known=known).label is None


def test_few_images(tmp_path):
    for count in (1, 2):
        folder_of(tmp_path, {f"{count}.png": picture()})
        message = refusal(data.load, str(tmp_path), "validation")
        assert f"has {count} image{'s'[: count - 1]}, none of them in the 'validation' part" in message
        assert len(data.load(str(tmp_path), "all")) == count


def test_a_dataset_s_name_is_the_dataset_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "digits", {"a.png": picture()})
    folder_of(tmp_path / "mine", {"a.png": picture()})
    assert data.load("digits", "train").input_shape == (8, 8, 1)
    assert data.load("./digits", "all").input_shape == data.load("mine", "all").input_shape == (8, 8, 3)


# Arrays --------------------------------------------------------------------------------------------------------------

UNIT = RNG.uniform(size=(9, 6, 5)).astype(np.float32)
BYTES = np.stack([pixels(6, 5) for _ in range(9)])
ARRAYS = {  # array, options -> x, max_value
    "uint8": (BYTES[..., 0], {}, BYTES[..., :1], 255.0),
    "uint8 colour": (BYTES, {}, BYTES, 255.0),
    "channels first": (np.moveaxis(BYTES, -1, 1), {"channels_first": True}, BYTES, 255.0),
    "one channel last": (BYTES[..., :1], {}, BYTES[..., :1], 255.0),
    "floats to 1": (UNIT, {}, UNIT[..., None], 1.0),
    "float16": (UNIT.astype(np.float16), {}, UNIT.astype(np.float16).astype(np.float32)[..., None], 1.0),
    "int64": (BYTES.astype(np.int64), {"range": (0, 255)}, BYTES, 255.0),
    "uint16": ((UNIT * 65535).astype(np.uint16), {"range": (0, 65535)}, UNIT[..., None], 1.0),
    "floats from -1": (UNIT * 2 - 1, {"range": (-1, 1)}, UNIT[..., None], 1.0),
    "bool": (UNIT < 0.5, {}, (UNIT < 0.5)[..., None], 1.0),
    "digits": (BYTES % 17, {"range": (0, 16)}, BYTES % 17, 16.0),
    "standardised": (UNIT * 8 - 4, {"range": (-4, 4)}, UNIT[..., None], 1.0),
    "grey wanted": (BYTES, {"channels": 1}, (BYTES @ [0.299, 0.587, 0.114])[..., None], 255.0),
    "crop": (BYTES, {"crop": (1, 2, 3, 2)}, BYTES[:, 1:4, 2:4], 255.0),
    "few pixels": (BYTES[:, :3, :3], {"channels_first": True}, np.moveaxis(BYTES[:, :3, :3], 1, -1), 255.0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, tmp_path):
    array, options, x, max_value = ARRAYS[name]
    np.save(tmp_path / "a.npy", array)
    assert is_images(tmp_path / "a.npy")
    found = read(tmp_path / "a.npy", **options)
    assert found.max_value == max_value and found.x.dtype == (
        np.float32 if found.format.range != (0, max_value) else (np.uint8 if array.dtype.kind in "biu" else np.float32)
    )
    np.testing.assert_allclose(found.x, x, atol=1 if name == "grey wanted" else 2e-5)
    again = read_images(tmp_path / "a.npy", ImageOptions(**options), found.format)
    np.testing.assert_array_equal(again.x, found.x)
    assert ImageFormat.from_json(json.loads(json.dumps(found.format.to_json()))) == found.format


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.moveaxis(BYTES, -1, 1), r"set config.images.channels_first=True"),
        (np.zeros((9, 6, 5, 4), np.uint8), "images have 1 or 3 channels"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), r"images are numbers, \[N, H, W\]"),
        (np.zeros((0, 6, 5), np.uint8), "shape .0, 6, 5.*images are numbers"),
        (np.zeros((9, 6, 5), complex), "complex128, but images are numbers"),
        (np.where(UNIT < 0.01, np.nan, UNIT), "of the 9 images of .* have NaN"),
        (np.where(UNIT < 0.01, np.inf, UNIT), "have NaN or infinite values"),
        (UNIT * 8 - 4, r"set config.images.range to \(black, white\)"),
        ((UNIT * 4095).astype(np.uint16), r"set config.images.range"),
        (UNIT * 2 - 1, r"set config.images.range to \(black, white\)"),
        (BYTES.astype(np.int64), r"such as \(0, 255\)"),
        ((UNIT < 0.5).astype(np.uint8), r"set config.images.range to \(black, white\), such as \(0, 1\)"),
    ],
)
def test_refusals_of_arrays(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.npy")
    assert "\n" not in str(error.value)


def test_what_is_not_an_array_of_images_is_a_table(tmp_path):
    np.save(tmp_path / "a.npy", RNG.normal(size=(40, 3)))
    assert not is_images(tmp_path / "a.npy") and data.load(str(tmp_path / "a.npy"), "train").input_shape == (3,)
    np.save(tmp_path / "b.npy", np.array([np.zeros((2, 2)), np.zeros((3, 3))], object), allow_pickle=True)
    assert "cannot read" in refusal(data.load, str(tmp_path / "b.npy"), "train")
    archive_of(tmp_path / "c.zip", {"rows.csv": b"a,b\n" + b"1,2\n2,3\n" * 20})
    assert data.load(str(tmp_path / "c.zip"), "all").input_shape == (2,)


def test_parts_and_labels_of_npz(tmp_path):
    path, y = tmp_path / "a.npz", np.arange(9) % 3 + 4
    for arrays in (
        {"x_train": BYTES, "y_train": y, "x_test": BYTES[:4], "y_test": y[:4]},
        {"train_images": BYTES, "train_labels": y[:, None], "test_images": BYTES[:4], "test_labels": y[:4, None]},
    ):
        np.savez(path, **arrays)
        source = data.open_source(data.DataOptions(str(path), "train", "val"))
        train, test = (source.split(split) for split in ("train", "test"))
        assert (len(train), len(test)) == (9, 4) and source.schema.labels == ("4", "5", "6")
        np.testing.assert_array_equal(train.label, y - 4)
        np.testing.assert_array_equal(test.x, BYTES[:4])
    np.savez(path, images=BYTES, names=np.array(["b", "a", "a"] * 3))
    assert data.load(str(path), "all").label.tolist() == [1, 0, 0] * 3
    for arrays in ({"a": BYTES, "b": BYTES}, {"a": BYTES, "b": y[:3]}, {"test": BYTES, "val": BYTES}):
        np.savez(path, **arrays)
        assert "must hold one array of images" in refusal(read, path)
    np.savez(path, train=BYTES, test=BYTES[:, :4])
    assert "differ in shape or type" in refusal(read, path)
    np.savez(path, x=BYTES, y=RNG.uniform(size=9))
    assert "must be integers or text" in refusal(read, path)


# Caching -------------------------------------------------------------------------------------------------------------


def test_files_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "photos", {f"{i}.png": picture() for i in range(3)})
    first, calls, decode = read(folder), [], image_files._decode
    monkeypatch.setattr(image_files, "_decode", lambda *a: calls.append(a[0]) or decode(*a))
    np.testing.assert_array_equal(read(folder).x, first.x)
    assert not calls and fingerprint(folder) == first.fingerprint
    assert read(folder, size=4).x.shape[1:3] == (4, 4) and len(calls) == 3
    folder_of(folder, {"1.png": picture()})
    os.utime(folder / "1.png", ns=(1, 1))
    changed_images = read(folder)
    assert (changed_images.x[1] != first.x[1]).any() and changed_images.fingerprint != first.fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == changed_images.fingerprint


# Configs -------------------------------------------------------------------------------------------------------------

IMAGE_CONFIGS = ("pm_vae_images", "vqvae_images", "pm_vqvae_images", "pm_vdvae_images", "vade_images", "pm_vade_images")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 64, 3), (28, 28, 1), (36, 20, 3)], ids=str)
@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_configs_adapt_to_the_size_of_the_images(name, shape):
    family = next(family for family in sorted(FAMILIES, key=len)[::-1] if name.startswith(family))
    options, base = plain(load(name).model), FAMILIES[family].base
    if base and base.required:
        options = options | {base.part: plain(load(f"{base.model}_images").model)}
    if family == "pm_vqvae":
        options["pixel_cnn"]["num_resnet"] = 1  # others build faster

    def build():
        return models.build(family, options, shape, nnx.Rngs(0))

    def reconstruct():
        vae = getattr(build(), "vae", None) or build()
        return vae.decode(np.zeros((2, vae.latent_dim), np.float32)).mean

    if family == "pm_vdvae" and shape[0] != shape[1]:
        assert "needs square images" in refusal(build)
        return
    weights = jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param))
    assert 100_000 < sum(np.prod(weight.shape) for weight in weights) < 30_000_000
    if family in ("pm_vae", "vade"):
        assert jax.eval_shape(reconstruct).shape == (2, *shape)
    generator = FAMILIES[family].parse(load(name)).options
    if hasattr(generator, "mask_generator"):
        generator.mask_generator.check(shape)


# Runs and imputation -------------------------------------------------------------------------------------------------

FEW = {"num_samples": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with `photos` of 12x10 pixels in two subfolders, and a PM-VAE `run` on their middle 8x8 pixels."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTERIOR_MATCHING_CACHE", str(folder / "cache"))
        photos = {f"{'ab'[i % 2]}/{i}.png": picture(12, 10) for i in range(30)}
        folder_of(folder / "photos", photos)
        config = small("pm_vae_images", dataset=str(folder / "photos"), steps=3)
        config.images.crop = (2, 1, 8, 8)
        FAMILIES["pm_vae"].train(config, str(folder / "run"))
    folder_of(folder / "new", {"one.png": picture(12, 10), "in/two.jpg": encoded(picture(12, 10), "jpeg")})
    mask = np.full((12, 10), 255, np.uint8)
    mask[5:9, 4:8] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def fill(run, source, output, **options):
    options = {key: str(value) if key == "mask" else value for key, value in options.items()}
    return impute(str(run / "run"), str(source), str(output), **(FEW | options))


def cropped(path):
    return np.asarray(Image.open(path).convert("RGB"))[2:10, 1:9]


@pytest.mark.slow
def test_what_a_run_keeps(run):
    description = runs.read_description(run / "run")
    kept = data.saved_schema(description)
    assert kept == ImageFormat((8, 8, 3), "uint8", (0.0, 255.0), ("a", "b"))
    config = description["config"]
    with pytest.raises(UserError, match=r"photos' has changed since .* was begun"):
        folder_of(run / "photos", {"a/extra.png": picture(12, 10)})
        try:
            FAMILIES["pm_vae"].train(config, str(run / "run"))
        finally:
            (run / "photos" / "a" / "extra.png").unlink()
    results = uci.evaluate(run / "run", num_instances=4, num_samples=2, num_trials=1, split="train")
    assert np.isfinite(results.trials("nrmse")).all()
    np.save(run / "grey.npy", BYTES[..., 0])
    message = refusal(uci.evaluate, run / "run", dataset=str(run / "grey.npy"), split="all")
    assert "config.images.crop is (2, 1, 8, 8), which does not lie inside" in message
    known = ImageFormat((8, 8, 3))
    assert "are 12x10 with 3 channels, but the run was trained on 8x8" in refusal(
        read_images, run / "new" / "one.png", known=known
    )
    folder_of(run / "wide", {"a.png": picture(12, 11), "b.png": picture(12, 10)})
    assert "pixels): resize them to 8x8" in refusal(read_images, run / "wide", known=known)


@pytest.mark.slow
def test_folders_of_images_are_filled(run, tmp_path):
    files = fill(run, run / "new", tmp_path / "out", mask=run / "mask.png", num_imputations=2)
    assert {str(f.relative_to(tmp_path / "out")) for f in files} == {
        "one_1.png", "one_2.png", "in/two_1.png", "in/two_2.png"
    }  # fmt: skip
    hole = np.zeros((8, 8), bool)
    hole[3:7, 3:7] = True
    for name, source in (("one", "one.png"), ("in/two", "in/two.jpg")):
        copies = [np.asarray(Image.open(tmp_path / "out" / f"{name}_{i}.png")) for i in (1, 2)]
        for copy in copies:
            np.testing.assert_array_equal(copy[~hole], cropped(run / "new" / source)[~hole])
        assert (copies[0] != copies[1])[hole].any()
    # The same image alone, in an archive, and with other pixels in its hole.
    alone = fill(run, run / "new" / "one.png", tmp_path / "alone.png", mask=run / "mask.png", kind="draws")
    assert alone == [tmp_path / "alone.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(alone[0])), np.asarray(Image.open(tmp_path / "out" / "one_1.png"))
    )
    other = np.asarray(Image.open(run / "new" / "one.png")).copy()
    other[5:9, 4:8] = 7
    archive_of(tmp_path / "other.zip", {"x.png": Image.fromarray(other)})
    masks = archive_of(tmp_path / "masks.zip", {"x.jpg": (run / "mask.png").read_bytes()})
    (file,) = fill(run, tmp_path / "other.zip", tmp_path / "other", mask=masks, kind="draws")
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(alone[0])))
    (point,) = fill(run, run / "new" / "one.png", tmp_path / "point", mask=run / "mask.png")
    assert point == tmp_path / "point" / "one.png"
    (other_seed,) = fill(run, run / "new" / "one.png", tmp_path / "seed", mask=run / "mask.png", kind="draws", seed=1)
    assert other_seed.read_bytes() != alone[0].read_bytes()


@pytest.mark.slow
def test_a_point_estimate_is_the_weighted_mean_of_draws(run):
    x, b = RNG.uniform(size=(2, 8, 8, 3)).astype(np.float32), np.zeros((2, 8, 8, 1), np.float32)
    b[:, :2] = 1.0
    model, n = runs.load_model(run / "run"), 4000
    draws, log_weights = jax.jit(lambda x, b: model.impute_and_weigh(x, b, n, key=jax.random.key(1)))(x, b)
    draws, weights = np.clip(draws, 0.0, 1.0), tempered_weights(log_weights)
    expected = weighted_mean(draws, weights)
    variance = weighted_mean(np.square(draws - expected), weights)
    effective = (1 / np.square(weights).sum(0)).reshape(2, 1, 1, 1)
    error = np.sqrt(2 * variance / effective)
    found = RowImputer(model, batch_size=2, num_samples=n).image(x, b)
    assert (np.abs(found - expected) < 5 * error + 1e-5).all() and error.max() > 1e-4
    assert np.abs(found - draws.mean(0)).max() > 10 * error.max()  # weights do matter


@pytest.mark.slow
def test_masks_from_a_generator_depend_on_the_image_alone(run, tmp_path):
    generator = {"mask_generator": "SquareMaskGenerator:size=3", "kind": "draws"}
    fill(run, run / "new", tmp_path / "both", **generator)
    (one,) = fill(run, run / "new" / "one.png", tmp_path / "one.png", **generator)
    found = np.asarray(Image.open(one))
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "both" / "one.png")))
    assert (found != cropped(run / "new" / "one.png")).any(-1).sum() <= 9


@pytest.mark.slow
def test_arrays_are_filled(run, tmp_path):
    values = RNG.uniform(0, 1, (3, 12, 10, 3)).astype(np.float64)
    values[0, 5, 4, 1], values[2, 6] = np.nan, np.nan
    np.save(run / "new.npy", values)
    files = fill(run, run / "new.npy", tmp_path / "png")
    assert [path.name for path in files] == ["0.png", "1.png", "2.png"]
    for file, image in zip(files, values[:, 2:10, 1:9], strict=True):
        found, observed = np.asarray(Image.open(file)), ~np.isnan(image).any(-1)
        np.testing.assert_array_equal(found[observed], np.rint(image * 255)[observed])


@pytest.mark.slow
def test_equal_images_get_independent_draws(run, tmp_path):
    same = (run / "new" / "one.png").read_bytes()
    folder_of(tmp_path / "same", {f"{i}.png": same for i in range(6)})
    first, *others = fill(run, tmp_path / "same", tmp_path / "out", mask=run / "mask.png", kind="draws")
    alone = fill(run, run / "new" / "one.png", tmp_path / "alone.png", mask=run / "mask.png", kind="draws")
    assert first.read_bytes() == alone[0].read_bytes()
    assert len({file.read_bytes() for file in (first, *others)}) == 6
    points = fill(run, tmp_path / "same", tmp_path / "points", mask=run / "mask.png")
    assert len({file.read_bytes() for file in points}) == 1


@pytest.mark.slow
def test_masks_of_zeros_and_ones(run, tmp_path):
    Image.fromarray(np.asarray(Image.open(run / "mask.png")) // 255).save(tmp_path / "mask.png")
    files = [fill(run, run / "new", tmp_path / str(i), mask=m / "mask.png") for i, m in enumerate((run, tmp_path))]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says where the holes are: set --mask"),
        ({"mask": "mask.png", "mask_generator": "config"}, "choose one"),
        ({"mask": "no.png"}, "no file or folder"),
        ({"mask": "new/one.png"}, "is not black and white"),
        ({"mask": "white.png"}, "the masks have no holes"),
        ({"mask": "small.png"}, "the mask 'small.png' is 5x5, but the image '.*' is 12x10"),
        ({"mask": "clear.png"}, "the mask 'clear.png' is transparent: save it in black"),
        ({"mask": "photos"}, "has no masks for 2 of 2 images"),
        ({"mask": "mask.png", "output": "photos"}, "the output .* exists: name a new folder"),
        ({"mask": "mask.png", "output": "new/out"}, "lies in the input"),
        ({"mask": "mask.png", "output": "no/out"}, "there is no directory"),
        ({"mask": "mask.png", "output": "out.npy"}, "name a folder"),
        ({"mask": "mask.png", "output": "out.png"}, "name a folder"),
        ({"mask": "mask.png", "source": "rows.csv"}, "is no folder, .zip or file of images"),
        ({"mask": "mask.png", "source": "broken"}, r"cannot read 1 of the files of .*b.png.*: remove or replace it"),
        (
            {"mask": "mask.png", "source": "twins"},
            "two images of .* are named '[aA]', up to suffix and case: rename one",
        ),
        ({"mask_generator": "MNISTMaskGenerator"}, "does not fit data of shape"),
        ({"mask": "mask.png", "kind": "point", "num_imputations": 2}, "all copies would be equal"),
        ({"mask": "mask.png", "unknown_categories": "missing"}, "is for tables"),
        ({"mask": "mask.png", "checkpoint": "third"}, "unknown checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, message, run):
    Image.new("L", (10, 12), 255).save(run / "white.png")
    Image.new("L", (5, 5), 0).save(run / "small.png")
    Image.new("RGBA", (10, 12), (0, 0, 0, 0)).save(run / "clear.png")
    (run / "rows.csv").write_text("a,b\n1,2\n")
    folder_of(run / "broken", {"a.png": encoded(picture(12, 10)), "b.png": b"x"})
    folder_of(run / "twins", {"a.png": picture(12, 10), "A.bmp": encoded(picture(12, 10), "bmp")})
    options = dict(options)
    source, output = run / options.pop("source", "new"), run / options.pop("output", "filled")
    options |= {"mask": run / options["mask"]} if "mask" in options else {}
    before = contents(run)
    with pytest.raises(UserError, match=message) as error:
        fill(run, source, output, **options)
    assert "\n" not in str(error.value)
    after = contents(run)
    assert {name for name in after if not name.startswith("cache")} == {n for n in before if not n.startswith("cache")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pm_vqvae", "pm_vdvae"])
def test_the_imputers_of_other_families(name):
    """Drawn or averaged, an image gets the same whatever is around it."""
    config, base = plain(small(name).model), FAMILIES[name].base
    config |= {base.part: plain(small(base.model).model)} if base else {}
    model = models.build(name, config, (8, 8, 1), nnx.Rngs(0))
    imputer = RowImputer(UnitRange(model) if name == "pm_vdvae" else model, batch_size=2, num_samples=1)
    x = RNG.uniform(size=(3, 8, 8, 1)).astype(np.float32)
    x = np.rint(x * 16) / np.float32(16)
    b = (RNG.uniform(size=x.shape) < 0.5).astype(np.float32)
    for copy in (0, None):
        filled = imputer.image(x, b, copy)
        np.testing.assert_array_equal(imputer.image(x[::-1], b[::-1], copy)[::-1], filled)
        assert filled.min() >= 0 and filled.max() <= 1 and np.isfinite(filled).all()
        np.testing.assert_allclose(filled[b == 1], x[b == 1], atol=1e-6)


# Faces ---------------------------------------------------------------------------------------------------------------

TINY = {"steps": 2, "validation_every": 2, "log_every": 1, "batch_size": 2}
TINY_FACES = {
    "vqvae_celeb_a": {
        "model.strides": (8, 4),
        "model.codebook_size": 4,
        "model.hidden_units": 4,
        "model.residual_units": 2,
        "model.residual_blocks": 0,
    },
    "pm_vqvae_celeb_a": {"model.conditional_dim": 2, "model.pixel_cnn.num_resnet": 1, "model.pixel_cnn.num_filters": 2},
    "pm_vdvae_celeb_a": {
        "model.encoder": "64d64,1x1",
        "model.decoder": "1x1,64m1",
        "model.latent_dim": 1,
        "model.width": 4,
        "model.num_components": 1,
        "model.rematerialise": False,
        "model.compute_dtype": "float32",
    },
}


@pytest.mark.slow
def test_faces_train_every_config_for_them(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (80, 109, 89, 3), np.uint8)  # of the size of CelebA's
    faces = archive_of(tmp_path / "faces.zip", {f"{i:06}.png": Image.fromarray(p) for i, p in enumerate(pictures)})
    images = read(faces, crop=(22, 12, 64, 64))
    np.testing.assert_array_equal(images.x[0], pictures[0, 22:86, 12:76])
    for name, changes in TINY_FACES.items():
        config = changed(load(name), TINY | changes | {"dataset": str(faces), "images.crop": (22, 12, 64, 64)})
        if name == "pm_vqvae_celeb_a":
            config.vqvae_dir = str(tmp_path / "vqvae_celeb_a")
            config.dataset, config.images = None, load(name).images  # the VQ-VAE's
        if "mask_generator" in config:
            config.mask_generator = {"name": "GCFMaskGenerator"}  # a part of the config's, which compiles slowly
        family = dataclasses.replace(FAMILIES[name.removesuffix("_celeb_a")], pictures=None)  # slow to compile
        family.train(config, str(tmp_path / name))
        assert np.isfinite(rows(tmp_path / name)[-1]["val_loss"])
        saved = runs.read_description(tmp_path / name)
        assert saved["config"]["dataset"] == str(faces)
        assert data.DataOptions.of_run(saved).images.crop == (22, 12, 64, 64)
