"""Which rows form a batch: epochs without replacement, the training feed, padded evaluation batches."""

import jax
import numpy as np
import pytest

from posterior_matching.data.dataset import padded_batches
from posterior_matching.training.batching import EpochOrder, TrainingFeed, evaluation_chunks

DEVICES = 4


# Epochs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (7, 7), (5, 12), (1, 3), (100, 32)])
def test_every_row_exactly_once_per_epoch(num_rows, batch_size):
    steps = -(-3 * num_rows // batch_size)
    order = EpochOrder(num_rows, seed=0).batches(0, steps, batch_size)
    assert order.shape == (steps, batch_size) and order.dtype == np.int32
    for epoch in order.reshape(-1)[: 3 * num_rows].reshape(3, num_rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_rows))


def test_epochs_differ_and_are_shuffled():
    epochs = EpochOrder(50, seed=0).batches(0, 3, 50)
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(50)]}) == 4


def test_a_batch_crosses_the_border_of_two_epochs():
    order = EpochOrder(10, seed=3)
    first, second = order.batches(0, 2, 10)
    np.testing.assert_array_equal(order.batches(2, 1, 4)[0], [*first[8:], *second[:2]])


def test_a_batch_depends_on_seed_and_step_only():
    order = EpochOrder(23, seed=1)
    all_at_once = order.batches(0, 20, 5)
    for step in (19, 0, 7):
        np.testing.assert_array_equal(order.batches(step, 1, 5)[0], all_at_once[step])
        np.testing.assert_array_equal(EpochOrder(23, seed=1).batches(step, 1, 5)[0], all_at_once[step])
    np.testing.assert_array_equal(order.batches(6, 9, 5), all_at_once[6:15])
    assert not np.array_equal(EpochOrder(23, seed=2).batches(0, 20, 5), all_at_once)
    assert not np.array_equal(EpochOrder(23, seed=1, stream=1).batches(0, 20, 5), all_at_once)


# Training feed -------------------------------------------------------------------------------------------------------


def rows_of(num_rows):
    """Arrays whose values say which row they are."""
    return {"x": np.arange(num_rows)[:, None] * np.ones(3), "y": np.arange(num_rows, dtype=np.int32)}


def read(feed, dispatches):
    """The rows that the devices see, `{name: [devices, steps, batch, ...]}`, gathered as the compiled step does."""
    found = []
    for (first_step, num_steps), (_, following) in zip(dispatches, [*dispatches[1:], (None, 0)], strict=True):
        arrays, indices = feed.get(first_step, num_steps, following)
        assert indices.shape[:2] == (DEVICES, num_steps)
        found.append(jax.tree.map(lambda a, i=indices: np.stack([a[d][i[d]] for d in range(DEVICES)]), arrays))
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *found)


@pytest.mark.parametrize("num_rows", [23, 24, 25])
def test_shares_are_disjoint_and_cover_all_rows(num_rows):
    feed = TrainingFeed(rows_of(num_rows), batch_size=1, seed=0, memory_budget_gb=1.0)
    seen = read(feed, [(0, 14)])
    np.testing.assert_array_equal(seen["x"], seen["y"][..., None] * np.ones(3))  # arrays stay in step
    shares = []
    for device, rows in enumerate(seen["y"][..., 0]):
        size = len(range(device, num_rows, DEVICES))
        for epoch in rows[: 2 * size].reshape(2, size):
            np.testing.assert_array_equal(np.sort(epoch), np.arange(device, num_rows, DEVICES))
        shares.extend(rows[:size])
    np.testing.assert_array_equal(np.sort(shares), np.arange(num_rows))


def test_streaming_gives_the_rows_of_resident_data():
    arrays = rows_of(23)
    dispatches = [(0, 1), (1, 3), (4, 3), (7, 1)]
    resident, streaming = (TrainingFeed(arrays, 3, 5, memory_budget_gb=budget) for budget in (1.0, 0.0))
    assert resident.resident and not streaming.resident
    expected = read(resident, dispatches)
    jax.tree.map(np.testing.assert_array_equal, read(streaming, dispatches), expected)
    # What was prepared ahead is not what is asked for: after an interruption, or when a run is resumed.
    streaming.get(0, 2, 3)
    other = read(streaming, [(4, 4)])
    np.testing.assert_array_equal(other["y"], expected["y"][:, 4:8])


def test_the_memory_budget_is_per_device():
    arrays = {"x": np.zeros((400, 10), np.float32)}  # 16,000 bytes, 4,000 on each device
    assert TrainingFeed(arrays, 100, 0, memory_budget_gb=4001e-9).resident  # batches may be as large as a share
    assert not TrainingFeed(arrays, 100, 0, memory_budget_gb=3999e-9).resident


# Evaluation ----------------------------------------------------------------------------------------------------------

SIZES = [(1, 4), (4, 4), (5, 4), (7, 1), (12, 5), (1797, 32)]


@pytest.mark.parametrize("num_rows, batch_size", SIZES)
def test_padded_batches_hold_every_row_once(num_rows, batch_size):
    indices, weights = padded_batches(num_rows, batch_size)
    assert indices.shape == weights.shape == (-(-num_rows // batch_size), batch_size)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    np.testing.assert_array_equal(indices[weights == 1], np.arange(num_rows))  # in order, nothing twice
    assert (indices >= 0).all() and (indices < num_rows).all()  # padding can be gathered, too


@pytest.mark.parametrize("chunk_gb", [0.25, 1e-12, 1e-6])
@pytest.mark.parametrize("num_rows, batch_size", SIZES)
def test_evaluation_chunks_hold_every_row_once(num_rows, batch_size, chunk_gb):
    arrays = rows_of(num_rows)
    chunks = list(evaluation_chunks(arrays, batch_size, chunk_gb))
    counted = []
    for chunk, weights in chunks:
        assert weights.shape[0] == DEVICES and weights.shape[2] == batch_size
        assert chunk["x"].shape == (*weights.shape, 3) and chunk["y"].shape == weights.shape
        np.testing.assert_array_equal(chunk["x"][..., 0], chunk["y"])
        counted.extend(chunk["y"][weights == 1])
        assert set(np.unique(weights)) <= {0.0, 1.0}
    np.testing.assert_array_equal(np.sort(counted), np.arange(num_rows))
    total_batches = -(-num_rows // (batch_size * DEVICES))
    assert sum(weights.shape[1] for _, weights in chunks) == total_batches
    row_gb = 28e-9
    assert len(chunks) == -(-total_batches // max(1, int(chunk_gb / (batch_size * row_gb))))
