"""Batches: epochs without replacement in training, every example once in evaluation."""

import concurrent.futures
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from posterior_matching import parallel
from posterior_matching.data.dataset import padded_batches
from posterior_matching.errors import OptionError

Arrays = dict[str, np.ndarray]


def default_batch_size(num_rows: int) -> int:
    """Returns the batch size for `num_rows` training rows per device: about an eighth, a power of 2 from 8 to 256."""
    return min(num_rows, 2 ** min(max(num_rows // 8, 8).bit_length() - 1, 8))


class EpochOrder:
    """An endless ordering of the rows 0..num_rows-1: one permutation per epoch, drawn from (seed, stream, epoch).

    A batch depends on the step alone, so resuming needs no iterator state. Batches cross epoch boundaries, so no row is
    ever dropped.
    """

    def __init__(self, num_rows: int, seed: int, stream: int = 0):
        self._num_rows = num_rows
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, stream, epoch)).permutation(num_rows).astype(np.int32)
        )

    def batches(self, first_step: int, num_steps: int, batch_size: int) -> np.ndarray:
        """Returns the rows of steps `first_step`, ..., int32 `[num_steps, batch_size]`."""
        positions = np.arange(first_step * batch_size, (first_step + num_steps) * batch_size)
        epochs, offsets = np.divmod(positions, self._num_rows)
        rows = np.empty(len(positions), np.int32)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._epoch(int(epoch))[offsets[epochs == epoch]]
        return rows.reshape(num_steps, batch_size)


class TrainingFeed:
    """Batches for the compiled step, which gathers rows by index from the arrays it is given.

    Device d of D owns rows d, d + D, .... If the data fit into `memory_budget_gb` per device, they stay on the devices
    and only indices are transferred. Otherwise the host gathers the rows of the next dispatch while the devices work.

    Args:
        arrays: The training data, leading axis N.
        batch_size: Per device.
        seed: Random seed of the permutations.
        memory_budget_gb: Maximum gigabytes (1e9 bytes) of data per device; 0 always streams.

    Raises:
        OptionError: A batch is larger than a device's share of the data.
    """

    def __init__(self, arrays: Arrays, batch_size: int, seed: int, memory_budget_gb: float):
        num_rows = len(next(iter(arrays.values())))
        num_devices = jax.device_count()
        if num_rows < batch_size * num_devices:
            raise OptionError(
                "batch_size",
                f"a batch of {batch_size} on each of {num_devices} device(s) exceeds the {num_rows} training examples: "
                f"set {{}} to at most {num_rows // num_devices}",
            )
        self._arrays, self._batch_size = arrays, batch_size
        self._rows = [np.arange(d, num_rows, num_devices) for d in parallel.local_devices()]
        self._orders = [
            EpochOrder(len(rows), seed, d) for rows, d in zip(self._rows, parallel.local_devices(), strict=True)
        ]
        size_gb = sum(a.nbytes for a in arrays.values()) / num_devices / 1e9
        self.resident = size_gb <= memory_budget_gb
        if self.resident:
            length = -(-num_rows // num_devices)  # shares differ by at most one row; the padding is never indexed
            filled = [np.resize(rows, length) for rows in self._rows]
            self._shares = parallel.shard({k: np.stack([a[rows] for rows in filled]) for k, a in arrays.items()})
        else:
            self._gatherer = concurrent.futures.ThreadPoolExecutor(1)
            self._ahead: tuple[tuple[int, int], concurrent.futures.Future] | None = None

    def get(self, first_step: int, num_steps: int, next_num_steps: int) -> tuple[Any, np.ndarray]:
        """Returns the arrays `[local devices, rows, ...]` and the indices `[local devices, num_steps, batch_size]`.

        Args:
            first_step: First step of the dispatch.
            num_steps: Steps of the dispatch.
            next_num_steps: Steps of the next dispatch (0 if there is none), prepared in advance when streaming.
        """
        if self.resident:
            return self._shares, self._batches(first_step, num_steps)
        if self._ahead is not None and self._ahead[0] == (first_step, num_steps):
            arrays = self._ahead[1].result()
        else:
            arrays = self._gather(first_step, num_steps)
        if next_num_steps:
            ahead = (first_step + num_steps, next_num_steps)
            self._ahead = (ahead, self._gatherer.submit(self._gather, *ahead))
        shape = (len(self._rows), num_steps, self._batch_size)
        return arrays, np.broadcast_to(
            np.arange(num_steps * self._batch_size, dtype=np.int32).reshape(shape[1:]), shape
        )

    def _batches(self, first_step: int, num_steps: int) -> np.ndarray:
        return np.stack([order.batches(first_step, num_steps, self._batch_size) for order in self._orders])

    def _gather(self, first_step: int, num_steps: int) -> Any:
        indices = self._batches(first_step, num_steps).reshape(len(self._rows), -1)
        rows = np.stack([share[i] for share, i in zip(self._rows, indices, strict=True)])
        return parallel.shard({k: a[rows] for k, a in self._arrays.items()})


def evaluation_chunks(arrays: Arrays, batch_size: int, chunk_gb: float = 0.25) -> Iterator[tuple[Arrays, np.ndarray]]:
    """Yields every example once, split over the devices, in chunks of whole batches.

    Args:
        arrays: The data, leading axis N.
        batch_size: Per device.
        chunk_gb: Approximate gigabytes of data per device and chunk.

    Yields:
        Arrays `[local devices, batches, batch_size, ...]` and weights `[local devices, batches, batch_size]`, 0 for
        padding.
    """
    num_rows = len(next(iter(arrays.values())))
    indices, weights = padded_batches(num_rows, batch_size * jax.device_count())
    shape = (-1, jax.device_count(), batch_size)
    indices, weights = (a.reshape(shape).swapaxes(0, 1)[parallel.local_devices()] for a in (indices, weights))
    batch_gb = batch_size * sum(a[0].nbytes for a in arrays.values()) / 1e9
    step = max(1, int(chunk_gb / batch_gb))
    for start in range(0, indices.shape[1], step):
        chunk = indices[:, start : start + step]
        yield {k: a[chunk] for k, a in arrays.items()}, weights[:, start : start + step]


class ValidationChunks:
    """The validation data in padded chunks, kept on the devices when they fit there.

    Yields arrays `[local devices, batches, batch_size, ...]`, weights (0 for padding) and the indices of the batches.
    """

    def __init__(self, arrays: Arrays, batch_size: int, memory_budget_gb: float):
        self._arrays, self._batch_size = arrays, batch_size
        size_gb = sum(a.nbytes for a in arrays.values()) / jax.device_count() / 1e9
        self._kept = list(parallel.shard(list(self._read()))) if size_gb <= memory_budget_gb else None

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[Any, Any, Any]]:
        first = 0
        for arrays, weights in evaluation_chunks(self._arrays, self._batch_size):
            num_batches = weights.shape[1]
            index = np.broadcast_to(np.arange(first, first + num_batches), (len(weights), num_batches))
            first += num_batches
            yield arrays, weights, index
