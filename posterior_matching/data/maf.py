"""The paper's five tables from their public archives, preprocessed as by Papamakarios et al. (2017).

Every function takes the files of a dataset and returns train, val and test. The steps are those of appendix D of
"Masked Autoregressive Flow for Density Estimation" and of the authors' code (github.com/gpapamak/maf, `datasets/`).
That code starts from intermediate files, whose random choices are unknown: the noise on the time of day in `power`, the
quarter of the readings in `gas`, photographs, positions and noise in `bsds`. Here they follow from fixed seeds. All
else, the order of rows included, is as published. `gaussian` checks the result.
"""

import contextlib
import gzip
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pandas as pd

from posterior_matching.data.builtin import patch_features
from posterior_matching.errors import UserError

Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val, test; [N, d] float32


def power(files: Sequence[Path]) -> Splits:
    """Power, voltage, three meters and time of day of one household, for each minute without missing values.

    Args:
        files: `household_power_consumption.txt` or a zip archive of it: `;` between the values, `?` where missing.
    """
    with _open(files, "household_power_consumption.txt") as file:
        columns = {"na_values": "?", "dtype": {"Time": "category"}, "usecols": lambda name: name != "Date"}
        frame = pd.read_csv(file, sep=";", **columns).dropna()
    clock = frame["Time"].cat
    minute = np.array([60 * int(time[:-6]) + int(time[-5:-3]) for time in clock.categories])[clock.codes]  # 17:24:00
    # The published code drops two columns: reactive power, which is often exactly 0, and global intensity.
    names = ["Global_active_power", "Voltage", "Sub_metering_1", "Sub_metering_2", "Sub_metering_3"]
    x = np.column_stack([frame[names], minute + np.random.default_rng(0).uniform(size=len(frame))])
    rng = np.random.RandomState(42)  # the published shuffle, and noise of the size of the resolution
    x = x[rng.permutation(len(x))]
    x[:, 1] += 0.01 * rng.rand(len(x))
    x[:, 0] += 0.001 * rng.rand(len(x))
    x[:, 2:5] += rng.rand(len(x), 3)
    return _standardised(*_last_tenths(x))


def gas(files: Sequence[Path]) -> Splits:
    """Eight of sixteen gas sensors in mixtures of ethylene and carbon monoxide, for a random quarter of the readings.

    Args:
        files: `ethylene_CO.txt` or a zip archive of it: a header line, then time, two concentrations, 16 sensors.
    """
    with _open(files, "ethylene_CO.txt") as file:
        table = {"header": None, "skiprows": 1, "usecols": range(3, 19), "dtype": np.float32}
        chunks = pd.read_csv(file, sep=r"\s+", chunksize=200_000, **table)
        x = np.concatenate([chunk.to_numpy() for chunk in chunks])
    x = x[np.random.default_rng(0).permutation(len(x))[: round(len(x) / 4)]].astype(np.float64)
    x = x[:, _uncorrelated(np.corrcoef(x, rowvar=False))]
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    train, val, test = _last_tenths(x)
    return _float32(train, val, test)


def _uncorrelated(correlation: np.ndarray) -> list[int]:
    """Returns the columns that remain when the first with a correlation above 0.98 is dropped until there is none."""
    kept = list(range(len(correlation)))
    while (redundant := (correlation[np.ix_(kept, kept)] > 0.98).sum(axis=1) > 1).any():  # 1: with itself
        del kept[redundant.argmax()]
    return kept


def hepmass(files: Sequence[Path]) -> Splits:
    """Signal events among the first tenth of the simulated collisions, in 21 kinematic features.

    Args:
        files: `1000_train.csv.gz` and `1000_test.csv.gz`, or a zip archive of them: a header line, then the label
            (1 = signal) and 27 features. The header names only 26, and the published tables lack the last.
    """
    x, test = _signals(files, "1000_train.csv", 700_000), _signals(files, "1000_test.csv", 350_000)
    varied = ~_has_spike(x)
    x, test = x[:, varied], test[:, varied]
    mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
    train, val = np.split((x - mean) / std, [-int(0.1 * len(x))])
    return _float32(train, val, (test - mean) / std)


def _signals(files: Sequence[Path], name: str, num_rows: int) -> np.ndarray:
    with _open(files, name) as file:
        x = pd.read_csv(file, skiprows=1, header=None, usecols=range(27), nrows=num_rows).to_numpy()
    return x[x[:, 0] == 1, 1:]


def miniboone(files: Sequence[Path]) -> Splits:
    """Electron neutrino events, in 43 features.

    Args:
        files: `MiniBooNE_PID.txt` or a zip archive of it: a line with the numbers of signal and background events, then
            the events, 50 features each.
    """
    with _open(files, "MiniBooNE_PID.txt") as file:
        num_signals = int(file.readline().split()[0])
        x = pd.read_csv(file, sep=r"\s+", header=None, nrows=num_signals).to_numpy()
    x = x[x[:, 0] >= -100]  # 11 events have -999 everywhere
    return _standardised(*_last_tenths(x[:, ~_has_spike(x)]))


def bsds(files: Sequence[Path], num_rows: tuple[int, int, int]) -> Splits:
    """Grey 8x8 patches of the BSDS300 photographs as `patch_features`, [N, 63], at distinct random positions.

    As in Uria et al. (2016), 180 of the 200 training photographs give the training patches and 20 those for validation.

    Args:
        files: `BSDS300-images.tgz`: JPEG files in folders `train` and `test`.
        num_rows: Patches of train, val and test.
    """
    photographs = _photographs(files)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(photographs["train"]))
    num_val = len(order) // 10
    train, val = ([photographs["train"][i] for i in part] for part in (order[num_val:], order[:num_val]))
    first, second, third = (
        _patches(part, size, rng) for part, size in zip((train, val, photographs["test"]), num_rows, strict=True)
    )
    return first, second, third


def _photographs(files: Sequence[Path]) -> dict[str, list[np.ndarray]]:
    """Returns [H, W] uint8 photographs by folder, in the order of their names."""
    from PIL import Image

    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with tarfile.open(files[0]) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            folder = PurePosixPath(member.name).parent.name
            if folder in found and member.name.endswith(".jpg") and (file := archive.extractfile(member)):
                found[folder].append(np.asarray(Image.open(file).convert("L")))  # luma, rounded
    if not (found["test"] and len(found["train"]) >= 10):
        counts = f"{len(found['train'])} and {len(found['test'])}"
        raise UserError(f"'{files[0]}' has {counts} .jpg files in folders train and test, not 200 and 100")
    return found


def _patches(photographs: list[np.ndarray], num_rows: int, rng: np.random.Generator) -> np.ndarray:
    ends = np.linspace(0, num_rows, len(photographs) + 1).astype(int)  # shares that differ by at most one
    x = np.empty((num_rows, 63), np.float32)
    for photograph, start, end in zip(photographs, ends, ends[1:], strict=False):
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (8, 8))
        chosen = rng.choice(np.prod(windows.shape[:2]), end - start, replace=False)
        x[start:end] = patch_features(windows[np.unravel_index(chosen, windows.shape[:2])].reshape(-1, 64), rng)
    return x[rng.permutation(num_rows)]


# Splits of the above --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(files: Sequence[Path], name: str) -> Iterator[IO[bytes]]:
    """Opens the file `name` or `name.gz`, one of `files` or in a zip archive among them; unpacks it as it is read."""
    names = (name, f"{name}.gz")
    with contextlib.ExitStack() as stack:
        for path in files:
            if path.suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = {PurePosixPath(member).name: member for member in archive.namelist()}
                opened = [(found, archive.open(members[found])) for found in names if found in members]
            else:
                opened = [(path.name, path.open("rb"))] if path.name in names else []
            for found, file in opened[:1]:
                stack.enter_context(file)
                yield gzip.GzipFile(fileobj=file) if found.endswith(".gz") else file  # type: ignore[misc]
                return
    raise UserError(f"no {name} in {', '.join(repr(str(path)) for path in files)}")


def _has_spike(x: np.ndarray) -> np.ndarray:
    """Returns [d] whether the smallest value of a column occurs more than 5 times, the published rule for dropping it.

    The paper speaks of values that occur too often, but the code counts only the smallest.
    """
    return (x == x.min(axis=0)).sum(axis=0) > 5


def _last_tenths(x: np.ndarray) -> Splits:
    """Splits off the last tenth for test, and then the last tenth of the rest for validation."""
    x, test = np.split(x, [-int(0.1 * len(x))])
    train, val = np.split(x, [-int(0.1 * len(x))])
    return train, val, test


def _standardised(train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Splits:
    """Standardises with the mean and standard deviation of training and validation rows."""
    fitted = np.concatenate([train, val])
    mean, std = fitted.mean(axis=0), fitted.std(axis=0)
    return _float32(*((part - mean) / std for part in (train, val, test)))


def _float32(*parts: np.ndarray) -> Any:
    return tuple(part.astype(np.float32) for part in parts)
