"""The order of an epoch: a permutation, another one for each epoch and seed, and as even as chance."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from text.order import ROUNDS, drawn, permuted

COUNTS = [*range(1, 34), 1000, *(2**k + d for k in (6, 10, 13) for d in (-1, 0, 1))]


def order(seed, epoch, count):
    return drawn(seed, range(epoch * count, (epoch + 1) * count), count)[0]


def chi_square(observed, expected):
    """The statistic, less its mean under chance, in standard deviations: about normal."""
    freedom = np.size(observed) - 1
    return (((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("count", COUNTS)
def test_an_epoch_has_every_item_once(count):
    for seed, epoch in [(0, 0), (0, 1), (5, 3), (2**70, 9)]:
        assert np.array_equal(np.sort(order(seed, epoch, count)), np.arange(count))


@pytest.mark.parametrize("count", [*COUNTS, 4095, 4096, 4097, 8100])
def test_the_network_is_a_permutation_of_any_count(count):
    keys = np.random.default_rng(count).integers(2**64, size=ROUNDS, dtype=np.uint64)
    assert np.array_equal(np.sort(permuted(np.arange(count, dtype=np.uint64), keys, count)), np.arange(count))


@pytest.mark.parametrize("count", [2**40 - 1, 2**40, 2**40 + 1, 10**13, 2**62])
def test_items_of_a_very_long_epoch_are_in_it_and_differ(count):
    items, offsets = drawn(3, range(count - 500, count + 500), count, 77)
    assert items.min() >= 0 and items.max() < count
    assert len(np.unique(items[:500])) == len(np.unique(items[500:])) == 500
    assert set(offsets) <= set(range(78)) and [len(set(part)) for part in (offsets[:500], offsets[500:])] == [1, 1]


def test_epochs_and_seeds_have_orders_and_offsets_of_their_own():
    seeds = (0, 1, 7, 2**32, 2**32 + 1)
    orders = [order(seed, epoch, 100) for seed in seeds for epoch in range(3)]
    assert len({found.tobytes() for found in orders}) == 15
    # Two independent permutations agree in one place on average.
    agreeing = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(agreeing) == pytest.approx(1, abs=0.4) and max(agreeing) < 8
    assert (
        len({int(drawn(seed, range(100 * e, 100 * e + 1), 100, 10**6)[1][0]) for seed in seeds for e in range(3)}) == 15
    )


def test_a_draw_depends_on_its_number_alone():
    whole = drawn(1, range(0, 400), 37, 5)
    for numbers in (range(7, 8), range(30, 45), range(399, 100, -7), range(0, 0)):
        for part, all_of_it in zip(drawn(1, numbers, 37, 5), whole, strict=True):
            assert np.array_equal(part, all_of_it[list(numbers)])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_a_few_items_are_equally_likely(count):
    found = Counter(tuple(order(seed, epoch, count)) for seed in range(40) for epoch in range(60))
    kinds = list(permutations(range(count)))
    assert abs(chi_square(np.array([found[kind] for kind in kinds]), 2400 / len(kinds))) < 4


@pytest.mark.parametrize("count", [64, 1000, 1025, 4097])
def test_items_land_anywhere_and_apart_from_their_neighbours(count):
    """Sixteen intervals of places, and of distances between neighbours, each counted over 60 epochs."""
    landed, apart, later = np.zeros((16, 16)), np.zeros(16), np.zeros(16)
    for epoch in range(60):
        found = order(1, epoch, count)
        np.add.at(landed, (np.arange(count) * 16 // count, found * 16 // count), 1)
        distance = np.diff(found) % count - 1  # from 0 to count - 2
        np.add.at(apart, distance * 16 // (count - 1), 1)
        np.add.at(later, (order(1, epoch + 1, count) - found) % count * 16 // count, 1)
    expected = np.outer(*2 * [np.bincount(np.arange(count) * 16 // count)]) * 60 / count
    assert abs(chi_square(landed, expected)) < 4
    wide = np.bincount(np.arange(count - 1) * 16 // (count - 1)) / (count - 1) * 60 * (count - 1)
    assert abs(chi_square(apart, wide)) < 4
    assert abs(chi_square(later, np.bincount(np.arange(count) * 16 // count) * 60)) < 4
