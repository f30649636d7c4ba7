"""The base class of the TFDS builders of the five tabular datasets; the other files here hold facts."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging

from posterior_matching.atomic import replacing
from posterior_matching.data.cache import file_fingerprint
from posterior_matching.data.download import compare_checksum, fetch, record_checksum
from posterior_matching.data.gaussian import gaussian_log_likelihood
from posterior_matching.data.maf import Splits
from posterior_matching.errors import UserError, first_line

_SPLITS = ("train", "val", "test")


class TabularBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Float32 `features` in splits train, val and test, from preprocessed text files or the original archives.

    Files are taken from `<TFDS data dir>/downloads/manual/<name>`: `train.txt`, `val.txt` and `test.txt`, of
    whitespace-separated numbers, or else one set of `ARCHIVES`. Without either, the text files are downloaded from
    Google Drive, and if that fails, an archive from where it was published.

    Attributes:
        NUM_FEATURES: Columns of every file.
        ROWS: Rows of train, val and test after the standard preprocessing of Papamakarios et al. (2017); any other
            number gives a warning.
        GAUSSIAN_NATS: `gaussian_log_likelihood` of the published data (the same paper, table 1).
        DRIVE_IDS: Google Drive file ids of train, val and test.
        ARCHIVES: Sets of original files, each of which is enough. Files without a URL are only looked for.
        HOMEPAGE: Where the raw data come from.
        CITATION: BibTeX entry of the raw data.
    """

    VERSION = tfds.core.Version("1.0.0")
    NUM_FEATURES: ClassVar[int]
    ROWS: ClassVar[tuple[int, int, int]]
    GAUSSIAN_NATS: ClassVar[float]
    DRIVE_IDS: ClassVar[tuple[str, str, str]]
    ARCHIVES: ClassVar[tuple[tuple[str, ...], ...]]
    HOMEPAGE: ClassVar[str]
    CITATION: ClassVar[str]

    def preprocess(self, files: Sequence[Path]) -> Splits:
        """Returns train, val and test from one set of original files."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {"features": tfds.features.Tensor(shape=(self.NUM_FEATURES,), dtype=np.float32)}
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            disable_shuffling=True,  # rows stay in the order of the file
            metadata=_Metadata(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        del dl_manager  # it can neither resume a download nor, as gdown does, confirm a large one to Google Drive
        files = self._find() or self._download()
        print(f"preparing '{self.name}' from {', '.join(map(str, files))}", flush=True)
        if files == list(self._choices()[0]):
            checksums = list(map(file_fingerprint, files))
            parts: Sequence[np.ndarray] = [self._read_text(path) for path in files]
        else:
            checksums = list(map(compare_checksum, files))
            parts = self._read_archive(files)
            for path, checksum in zip(files, checksums, strict=True):
                record_checksum(path, checksum)
        for split, x, published in zip(_SPLITS, parts, self.ROWS, strict=True):
            if len(x) != published:
                what = f"split {split} of '{self.name}' has {len(x)} rows"
                logging.warning("%s, but %d in the published data: results will differ", what, published)
        for path, checksum in zip(files, checksums, strict=True):
            self.info.metadata[path.name] = {"sha256": checksum, **_stamp(path)}
        self.info.metadata["gaussian_nats"] = gaussian_log_likelihood(parts[0], parts[2])
        return {split: self._generate_examples(x) for split, x in zip(_SPLITS, parts, strict=True)}

    def _generate_examples(self, x: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for index, row in enumerate(x):
            yield index, {"features": row}

    def check_sources(self) -> None:
        """Raises a UserError if a file has been replaced since the dataset was prepared from it."""
        for name, before in self.info.metadata.items():
            path = self._folder / name
            if not isinstance(before, dict) or not path.exists():
                continue
            same_stamp = all(before.get(key) == value for key, value in _stamp(path).items())
            if not same_stamp and file_fingerprint(path) != before.get("sha256"):
                raise UserError(
                    f"'{path}' has changed since dataset '{self.name}' was prepared: delete '{self.data_path}' to "
                    "prepare it again, or put the old file back"
                )

    # Finding and downloading files

    @property
    def _folder(self) -> Path:
        return Path(self.data_dir_root) / "downloads" / "manual" / self.name

    def _choices(self) -> list[dict[Path, str]]:
        """Returns sets of files with their URLs, each of which is enough: first the text files, then `ARCHIVES`."""
        texts = {f"{s}.txt": f"{_DRIVE}{drive_id}" for s, drive_id in zip(_SPLITS, self.DRIVE_IDS, strict=True)}
        sets = [texts, *({url.split("/")[-1]: url for url in urls} for urls in self.ARCHIVES)]
        return [{self._folder / name: url for name, url in files.items()} for files in sets]

    def _find(self) -> list[Path] | None:
        return next((list(files) for files in self._choices() if all(path.exists() for path in files)), None)

    def _download(self) -> list[Path]:
        failures = {}
        for files in self._choices():
            for path, url in files.items():
                if path.exists():
                    continue
                if "://" not in url:
                    break
                print(f"downloading {url} to {path}", flush=True)
                try:
                    _fetch_from_drive(url, path) if url.startswith(_DRIVE) else fetch(url, path)
                except UserError:
                    raise
                except Exception as error:  # of gdown, requests or the file system: they have no common base
                    failures[url.split("/")[2]] = _reason(error)
                    break
            else:
                return list(files)
        sets = [
            " and ".join(url if url.endswith(path.name) else f"{path.name} ({url})" for path, url in files.items())
            for files in self._choices()
        ]
        reasons = ", ".join(f"{server}: {reason}" for server, reason in failures.items())
        raise UserError(
            f"cannot download dataset '{self.name}' ({reasons}): put into '{self._folder}' {'; or '.join(sets)}"
        )

    # Reading files

    def _read_text(self, path: Path) -> np.ndarray:
        remedy = f"it must have {self.NUM_FEATURES} finite numbers a line; delete it to download it again"
        try:
            x = np.loadtxt(path, dtype=np.float32, ndmin=2, comments=None)
        except ValueError as error:
            raise UserError(f"cannot read '{path}' ({error}): {remedy}") from error
        if x.shape[1] != self.NUM_FEATURES:
            raise UserError(f"'{path}' has {x.shape[1]} columns: {remedy}")
        if not np.isfinite(x).all():
            raise UserError(f"row {np.argwhere(~np.isfinite(x))[0, 0] + 1} of '{path}' is not finite: {remedy}")
        return x

    def _read_archive(self, files: Sequence[Path]) -> Splits:
        names = " and ".join(f"'{path}'" for path in files)
        remedy = "delete it to download it again"
        try:
            parts = self.preprocess(files)
        except UserError:
            raise
        except Exception as error:  # of pandas, Pillow, zipfile, gzip or tarfile: they have no common base
            raise UserError(f"cannot read {names} ({_reason(error)}): {remedy}") from error
        shapes = {x.shape[1] for x in parts}
        if shapes != {self.NUM_FEATURES} or not all(len(x) and np.isfinite(x).all() for x in parts):
            raise UserError(f"{names} does not give {self.NUM_FEATURES} finite features: {remedy}")
        return parts


class _Metadata(tfds.core.MetadataDict):
    """The identities of the files by name, and `gaussian_nats`; empty if prepared by version 0.1."""

    def load_metadata(self, data_dir: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().load_metadata(data_dir)


_DRIVE = "https://drive.google.com/uc?id="


def _fetch_from_drive(url: str, path: Path) -> None:
    import gdown

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        gdown.download(url, output=str(temporary))


def _stamp(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.RequestException):  # whose messages are long
        return type(error).__name__
    return first_line(error)
