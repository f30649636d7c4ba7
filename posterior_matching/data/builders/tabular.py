"""The base class of the TFDS builders of the five tabular datasets; the other files here hold only facts."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from posterior_matching.atomic import replacing
from posterior_matching.errors import UserError


class TabularBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Float32 `features` in splits train, val and test, each from one text file of whitespace-separated numbers.

    The files are `<TFDS data dir>/downloads/manual/<name>/{train,val,test}.txt`. Missing ones are downloaded there from
    Google Drive; they can also be put there by hand.

    Attributes:
        NUM_FEATURES: Columns of every file.
        ROWS: Rows of train, val and test after the standard preprocessing of Papamakarios et al. (2017); any other
            number gives a warning.
        DRIVE_IDS: Google Drive file ids of train, val and test.
        HOMEPAGE: Where the raw data come from.
        CITATION: BibTeX entry of the raw data.
    """

    VERSION = tfds.core.Version("1.0.0")
    NUM_FEATURES: ClassVar[int]
    ROWS: ClassVar[tuple[int, int, int]]
    DRIVE_IDS: ClassVar[tuple[str, str, str]]
    HOMEPAGE: ClassVar[str]
    CITATION: ClassVar[str]

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
            metadata=_Sources(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        del dl_manager  # Google Drive asks for confirmation of large downloads, which gdown handles
        files = self._files()
        for path, drive_id in zip(files.values(), self.DRIVE_IDS, strict=True):
            if not path.exists():
                self._download(drive_id, path)
        self.info.metadata.update({path.name: _identity(path) for path in files.values()})
        generators = {}
        for (split, path), num_rows in zip(files.items(), self.ROWS, strict=True):
            generators[split] = self._generate_examples(path, num_rows)
        return generators

    def _files(self) -> dict[str, Path]:
        folder = Path(self.data_dir_root) / "downloads" / "manual" / self.name
        return {split: folder / f"{split}.txt" for split in ("train", "val", "test")}

    def check_sources(self) -> None:
        """Raises a UserError if a text file has been replaced since the dataset was prepared from it."""
        for path in self._files().values():
            before = self.info.metadata.get(path.name)
            if before is None or not path.exists():
                continue
            same_stamp = [path.stat().st_size, path.stat().st_mtime_ns] == [before["bytes"], before["modified_ns"]]
            if not same_stamp and _identity(path)["sha256"] != before["sha256"]:
                raise UserError(
                    f"'{path}' has changed since dataset '{self.name}' was prepared: delete '{self.data_path}' to "
                    "prepare it again, or put the old file back"
                )

    def _download(self, drive_id: str, path: Path) -> None:
        import gdown

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                gdown.download(id=drive_id, output=str(temporary))
        except Exception as error:  # of gdown, requests or the file system: they have no common base
            links = [f"https://drive.google.com/uc?id={drive_id}" for drive_id in self.DRIVE_IDS]
            raise UserError(
                f"cannot download dataset '{self.name}' ({type(error).__name__}): download {', '.join(links)} "
                f"and put them into '{path.parent}' as train.txt, val.txt and test.txt"
            ) from error

    def _generate_examples(self, path: Path, num_rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        remedy = f"it must have {self.NUM_FEATURES} finite numbers a line; delete it to download it again"
        try:
            rows = np.loadtxt(path, dtype=np.float32, ndmin=2, comments=None)
        except ValueError as error:
            raise UserError(f"cannot read '{path}' ({error}): {remedy}") from error
        if rows.shape[1] != self.NUM_FEATURES:
            raise UserError(f"'{path}' has {rows.shape[1]} columns: {remedy}")
        if not np.isfinite(rows).all():
            raise UserError(f"row {np.argwhere(~np.isfinite(rows))[0, 0] + 1} of '{path}' is not finite: {remedy}")
        if len(rows) != num_rows:
            logging.warning(
                "'%s' has %d rows, but the published file has %d: results will differ", path, len(rows), num_rows
            )
        for index, row in enumerate(rows):
            yield index, {"features": row}


class _Sources(tfds.core.MetadataDict):
    """The identities of the text files, by name; empty if prepared by version 0.1."""

    def load_metadata(self, data_dir: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().load_metadata(data_dir)


def _identity(path: Path) -> dict[str, Any]:
    """Size, time of modification and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns, "sha256": digest}
