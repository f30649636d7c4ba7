"""What the TFDS builders of the paper's five tables (`datasets/`) share: files, downloads, checks, preprocessing.

The steps are those of appendix D of "Masked Autoregressive Flow for Density Estimation" (Papamakarios et al. 2017) and
of the authors' code (github.com/gpapamak/maf, `datasets/`), with the same order of rows. That code starts from
intermediate files whose random choices are unknown: the noise on the time of day in `power`, the quarter of the
readings in `gas`, photographs, positions and noise in `bsds`. Here they follow from fixed seeds; `gaussian` checks the
result.
"""

import contextlib
import functools
import gzip
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from posterior_matching.data.cache import fetch, file_fingerprint
from posterior_matching.data.gaussian import gaussian_log_likelihood
from posterior_matching.errors import UserError, first_line

Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val, test; [N, d] float32
_SPLITS = ("train", "val", "test")


class TabularBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Float32 `features` in splits train, val and test, from preprocessed text files or the original archives.

    Files are taken from `<TFDS data dir>/downloads/manual/<name>`: `train.txt`, `val.txt` and `test.txt`, of
    whitespace-separated numbers, or else one set of `ARCHIVES`. Without either, the text files are downloaded from
    Google Drive, and if that fails, an archive from where it was published.
    """

    VERSION = tfds.core.Version("1.0.0")
    NUM_FEATURES: ClassVar[int]
    ROWS: ClassVar[tuple[int, int, int]]  # of train, val and test as published; other numbers give a warning
    GAUSSIAN_NATS: ClassVar[float]  # `gaussian_log_likelihood` of the published data (the same paper, table 1)
    DRIVE_IDS: ClassVar[tuple[str, str, str]]  # of train, val and test
    ARCHIVES: ClassVar[tuple[tuple[str, ...], ...]]  # each set is enough; files without a URL are only looked for
    HOMEPAGE: ClassVar[str]  # of the raw data, as is the BibTeX entry
    CITATION: ClassVar[str]

    def preprocess(self, files: Sequence[Path]) -> Splits:
        """Returns train, val and test from one set of original files."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        row = tfds.features.Tensor(shape=(self.NUM_FEATURES,), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"features": row}),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            disable_shuffling=True,  # rows stay in the order of the file
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        del dl_manager  # it cannot confirm a large download to Google Drive, as gdown does
        choices = self._choices()
        files = next((list(c) for c in choices if all(path.exists() for path in c)), None) or self._download(choices)
        print(f"preparing '{self.name}' from {', '.join(map(str, files))}", flush=True)
        for path in files:
            self.info.metadata[path.name] = {"sha256": file_fingerprint(path), **_stamp(path)}
        if files == list(choices[0]):
            parts: Sequence[np.ndarray] = [self._read([path], functools.partial(_read_text, path))[0] for path in files]
        else:
            parts = self._read(files, lambda: self.preprocess(files))
        for split, x, published in zip(_SPLITS, parts, self.ROWS, strict=True):
            if len(x) != published:
                what = f"split {split} of '{self.name}' has {len(x)} rows"
                logging.warning("%s, but %d in the published data: results will differ", what, published)
        self.info.metadata["gaussian_nats"] = gaussian_log_likelihood(parts[0], parts[2])
        return {split: self._generate_examples(x) for split, x in zip(_SPLITS, parts, strict=True)}

    def _generate_examples(self, x: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for index, row in enumerate(x):
            yield index, {"features": row}

    def check_sources(self) -> None:
        """Raises a UserError if a file has been replaced since the dataset was prepared from it."""
        for name, before in self.info.metadata.items():
            path = self._folder / name
            if not isinstance(before, dict) or not path.exists() or before == before | _stamp(path):
                continue
            if file_fingerprint(path) != before["sha256"]:
                raise UserError(
                    f"'{path}' has changed since dataset '{self.name}' was prepared: delete '{self.data_path}' to "
                    "prepare it again, or put the old file back"
                )

    @property
    def _folder(self) -> Path:
        return Path(self.data_dir_root) / "downloads" / "manual" / self.name

    def _choices(self) -> list[dict[Path, str]]:
        """Returns sets of files with their URLs, each of which is enough: first the text files, then `ARCHIVES`."""
        drive = "https://drive.google.com/uc?id="
        texts = {f"{split}.txt": f"{drive}{file}" for split, file in zip(_SPLITS, self.DRIVE_IDS, strict=True)}
        sets = [texts, *({url.split("/")[-1]: url for url in urls} for urls in self.ARCHIVES)]
        return [{self._folder / name: url for name, url in files.items()} for files in sets]

    def _download(self, choices: list[dict[Path, str]]) -> list[Path]:
        failures = {}
        for files in choices:
            if not all("://" in url for url in files.values()):
                continue
            try:
                for path, url in files.items():
                    fetch(url, path)
                return list(files)
            except ConnectionError as error:
                failures[url.split("/")[2]] = error
        sets = [
            " and ".join(url if url.endswith(path.name) else f"{path.name} ({url})" for path, url in files.items())
            for files in choices
        ]
        reasons = ", ".join(f"{server}: {error}" for server, error in failures.items())
        raise UserError(
            f"cannot download dataset '{self.name}' ({reasons}): put into '{self._folder}' {'; or '.join(sets)}"
        )

    def _read(self, files: Sequence[Path], read: Callable[[], Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
        names = " and ".join(f"'{path}'" for path in files)
        remedy = f"it must have {self.NUM_FEATURES} finite numbers a row; delete it to download it again"
        try:
            parts = read()
        except UserError:
            raise
        except Exception as error:  # of pandas, Pillow, zipfile, gzip or tarfile: they have no common base
            raise UserError(f"cannot read {names} ({first_line(error)}): {remedy}") from error
        for x in parts:
            if x.shape[1] != self.NUM_FEATURES or not len(x):
                raise UserError(f"{names} gives {len(x)} rows of {x.shape[1]} columns: {remedy}")
            if not np.isfinite(x).all():
                raise UserError(f"row {np.argwhere(~np.isfinite(x))[0, 0] + 1} of {names} is not finite: {remedy}")
        return parts


def _stamp(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}


def _read_text(path: Path) -> list[np.ndarray]:
    return [np.loadtxt(path, dtype=np.float32, ndmin=2, comments=None)]


# Preprocessing that several tables share ------------------------------------------------------------------------------


@contextlib.contextmanager
def open_member(files: Sequence[Path], name: str) -> Iterator[IO[bytes]]:
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


def has_spike(x: np.ndarray) -> np.ndarray:
    """Returns [d] whether the smallest value of a column occurs more than 5 times, the published rule for dropping it.

    The paper speaks of values that occur too often, but the code counts only the smallest.
    """
    return (x == x.min(axis=0)).sum(axis=0) > 5


def last_tenths(x: np.ndarray) -> Splits:
    """Splits off the last tenth for test, and then the last tenth of the rest for validation."""
    x, test = np.split(x, [-int(0.1 * len(x))])
    train, val = np.split(x, [-int(0.1 * len(x))])
    return train, val, test


def standardised(train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Splits:
    """Standardises with the mean and standard deviation of training and validation rows."""
    fitted = np.concatenate([train, val])
    mean, std = fitted.mean(axis=0), fitted.std(axis=0)
    return float32(*((part - mean) / std for part in (train, val, test)))


def float32(*parts: np.ndarray) -> Any:
    """Returns the same arrays in single precision."""
    return tuple(part.astype(np.float32) for part in parts)
