"""Sensitivity: golden numbers, streaming against batch, shards against the whole, invariances, ties, refusals."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.send import sensitivity as module
from library.send.sensitivity import (
    checked_coordinates,
    drop_count,
    empty_record,
    mean_sensitivity,
    net_change,
    normalised,
    partial_sums,
    per_text,
    random_indices,
    record_of,
    scale_over_texts,
    scale_sums,
    sensitivity,
    top_indices,
    update,
    variance,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "send" / "sensitivity.npz")
SELECTIONS = ["product", "change", "variance"]


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streamed(values: torch.Tensor, dtype: torch.dtype = torch.float64):
    record = empty_record(*values.shape[1:], dtype=dtype)
    for checkpoint in values:
        record = update(record, checkpoint)
    return record


def close(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_docstring_example_runs():
    assert doctest.testmod(module, extraglobs={"torch": torch}) == (0, 2)


@pytest.mark.parametrize("make", [record_of, streamed])
def test_golden(make):
    record = make(golden("E"))
    torch.testing.assert_close(net_change(record), golden("net_change"), rtol=1e-10, atol=0)
    torch.testing.assert_close(variance(record), golden("variance"), rtol=1e-10, atol=0)
    torch.testing.assert_close(per_text(record), golden("sensitivity_per_point"), rtol=1e-10, atol=0)
    mean = mean_sensitivity(partial_sums(record))
    torch.testing.assert_close(mean, golden("sensitivity_mean"), rtol=1e-10, atol=0)
    top = top_indices(mean, drop_count(float(golden("k")), len(mean)))
    assert top.tolist() == golden("top_idx").tolist()
    torch.testing.assert_close(mean[top], golden("top_val"), rtol=1e-10, atol=0)


def test_the_axis_of_the_published_training_script_is_not_ours():
    """It averages over checkpoints and then differences over texts, which is no change between checkpoints."""
    swapped = golden("E").mean(0, keepdim=True).transpose(0, 1)
    script = sensitivity(swapped)
    top = top_indices(script, 12)
    assert top.tolist() == golden("official_training_script_idx").tolist()
    assert set(top.tolist()) != set(golden("top_idx").tolist())


@given(t=st.integers(2, 12), n=st.integers(1, 5), d=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_streaming_equals_batch(t, n, d, seed):
    values = embeddings(t, n, d, seed=seed) * 10 + 100
    for one, other in zip(streamed(values), record_of(values), strict=True):
        close(one, other)


def test_update_is_pure():
    first = streamed(embeddings(3, 2, 4))
    kept = [x.clone() for x in first]
    checkpoint = embeddings(2, 4, seed=1)
    after = update(first, checkpoint)
    checkpoint.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert after.previous.abs().sum() > 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("normalise", [False, True])
def test_shards_of_texts_add_up_to_the_whole(selection, normalise):
    values = embeddings(5, 11, 7)
    shards = [record_of(part) for part in values.split([4, 1, 6], dim=1)]
    mean = mean_sensitivity(sum(partial_sums(shard, selection) for shard in shards))
    if normalise:
        mean = normalised(mean, scale_over_texts(sum(scale_sums(shard) for shard in shards)), selection)
    close(mean, sensitivity(values, selection, normalise=normalise))
    assert partial_sums(shards[0], selection).shape == (8,)


@given(seed=st.integers(0, 2**31), factor=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_constants_shifts_and_scales(seed, factor):
    values = embeddings(4, 3, 5, seed=seed)
    still = values[:1].expand(4, 3, 5)
    assert all((sensitivity(still, s) < 1e-28).all() for s in SELECTIONS)
    shifted = values + embeddings(1, 3, 5, seed=seed + 1)
    for selection, power in zip(SELECTIONS, (3, 1, 2), strict=True):
        plain = sensitivity(values, selection)
        torch.testing.assert_close(sensitivity(shifted, selection), plain, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sensitivity(factor * values, selection), factor**power * plain, rtol=1e-10, atol=0)
        scaled = values * torch.tensor([factor, 1, 1, 1, 1])
        torch.testing.assert_close(
            sensitivity(scaled, selection, normalise=True),
            sensitivity(values, selection, normalise=True),
            rtol=1e-8,
            atol=0,
        )


def test_change_depends_on_the_order_of_checkpoints_and_variance_does_not():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()[:, None, None]
    shuffled = values[[0, 2, 1, 3]]
    assert float(net_change(record_of(values))) == 3
    assert float(net_change(record_of(shuffled))) == 5
    close(variance(record_of(values)), variance(record_of(shuffled)))
    assert float(variance(record_of(values))) == 1.25


def test_a_coordinate_that_no_text_moves_has_no_normalised_sensitivity():
    values = embeddings(4, 6, 3)
    values[:, :, 1] = embeddings(4, 1) + 1e3  # alike for all texts
    values[:, :, 2] = 0  # dropped
    scores = sensitivity(values, normalise=True)
    assert scores[0] > 0
    assert scores[1:].tolist() == [0, 0]


def test_float32_records_keep_their_precision_class():
    values = embeddings(6, 4, 5)
    record = streamed(values.float(), torch.float32)
    assert record.mean.dtype == torch.float32
    torch.testing.assert_close(per_text(record).double(), per_text(record_of(values)), rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_smaller_index():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert top_indices(scores, 4).tolist() == [1, 3, 2, 4]
    assert top_indices(torch.zeros(1000), 300).tolist() == list(range(300))


@given(d=st.integers(2, 300), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_random_indices_are_distinct_and_seeded(d, seed):
    count = max(1, d // 3)
    one, again = (random_indices(d, count, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, again)
    assert len(set(one.tolist())) == count
    assert 0 <= one.min() <= one.max() < d


def test_drop_count_is_the_published_int_of_the_product():
    cases = ((0.2, 64), (0.29, 100), (0.57, 100), (0.58, 50), (0.1, 30), (0.2, 9))
    assert [drop_count(f, d) for f, d in cases] == [12, 28, 56, 28, 3, 1]


def test_coordinates_are_whole_numbers_in_range():
    for index in ([3, 0], torch.tensor([3, 0], dtype=torch.int32), np.array([3, 0])):
        assert torch.equal(checked_coordinates(index, 4), torch.tensor([3, 0]))
    assert checked_coordinates([], 4).dtype == torch.int64
    for index in ([-1], [4], [1.0], [True, False], [[1], [2]]):
        with pytest.raises(InputError, match="whole numbers from 0 to 3"):
            checked_coordinates(torch.tensor(index), 4)


TWO = record_of(embeddings(2, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sensitivity(embeddings(1, 3, 4)), "at least 2 checkpoints, got 1"),
        (lambda: per_text(empty_record(3, 4)), "at least 2 checkpoints, got 0"),
        (lambda: scale_sums(empty_record(3, 4)), "no checkpoint"),
        (lambda: empty_record(0, 4), "at least one text"),
        (lambda: update(TWO, embeddings(3, 5)), r"\(3, 5\) where earlier checkpoints had \(3, 4\)"),
        (lambda: update(empty_record(3, 4, dtype=torch.bfloat16), embeddings(3, 4)), "float32 or float64"),
        (lambda: record_of(embeddings(3, 4)), "T, N, d"),
        (lambda: per_text(TWO, "random"), "allowed here: product, change, variance"),
        (lambda: sensitivity(embeddings(3, 1, 4), normalise=True), "at least two texts"),
        (lambda: drop_count(0.0, 10), "strictly between 0 and 1"),
        (lambda: drop_count(1.0, 10), "strictly between 0 and 1"),
        (lambda: drop_count(0.05, 10), "is 0; it must be 1 to 9"),
        (lambda: top_indices(torch.ones(4), 4), "allowed: 1 to 3"),
        (lambda: top_indices(torch.tensor([1.0, float("nan")]), 1), "coordinate 1 is NaN"),
        (lambda: top_indices(torch.ones(4, 5), 2), r"must have shape \(d,\), got \(4, 5\)"),
        (lambda: normalised(torch.ones(3), torch.ones(4)), r"\(3,\) do not fit scales of shape \(4,\)"),
        (lambda: random_indices(4, 0, generator=torch.Generator()), "cannot choose 0 of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_bad_texts_are_named():
    values = embeddings(2, 5, 3)
    values[1, 2, 0], values[0, 4, 1] = float("inf"), float("nan")
    with pytest.raises(InputError, match="text 2, 4 hold NaN"):
        record_of(values)
    with pytest.raises(InputError, match="text 2 hold"):
        update(empty_record(5, 3), values[1])
