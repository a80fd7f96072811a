"""The order in which an epoch reads its items: a random permutation that is computed item by item, and never stored.

A Feistel network on the pairs (left, right) of range(a) × range(b) changes one half in each round by a hash of the
other, so every round can be undone, and all of them together permute range(a * b) [Black & Rogaway 2002, "Ciphers with
Arbitrary Finite Domains", section 5]. With a = ceil(sqrt(count)) and b = ceil(count / a), fewer than a numbers are not
below count; such a result is permuted again until it is (cycle-walking, section 4). Memory and time grow with the
number of rows that are asked for, and not with the length of the epoch. An epoch of a few items is shuffled as a whole.
"""

from math import isqrt

import numpy as np

ROUNDS = 8  # four already look random for large a and b [Luby & Rackoff 1988]
FEW = 1 << 10  # items; for small a and b the rounds would favour some orders (if both are odd, the even permutations)


def drawn(seed: int, numbers: range, count: int, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (items, offsets), both (len(numbers),) int64, of these draws from an endless sequence of epochs.

    Draw n belongs to epoch n // count, which holds every item of range(count) once, in an order that depends on seed
    and epoch alone; so does its offset, from 0 to `spare`. count is at most 2^62, spare less than 2^63.
    """
    items, offsets = np.empty((2, len(numbers)), dtype=np.int64)
    epochs = np.array([n // count for n in numbers], dtype=np.int64)
    places = np.array([n % count for n in numbers], dtype=np.uint64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        # NumPy promises that the words of a SeedSequence stay the same; it does not promise this of permutation().
        source = np.random.SeedSequence(seed, spawn_key=(int(epoch),))
        words = source.generate_state(1 + (count if count <= FEW else ROUNDS), np.uint64)
        offsets[rows], keys = int(words[0]) % (spare + 1), words[1:]
        items[rows] = np.argsort(keys)[places[rows]] if count <= FEW else permuted(places[rows], keys, count)
    return items, offsets


def permuted(places: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return where a permutation of range(count) takes `places`, (n,) uint64 below count; keys: (ROUNDS,) uint64."""
    a = isqrt(count - 1) + 1
    sides = np.uint64(a), np.uint64(-(-count // a))
    result, outside = places.copy(), np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = result[outside] % sides[0], result[outside] // sides[0]
        for i in range(0, len(keys), 2):
            left = (left + hashed(right, keys[i])) % sides[0]
            right = (right + hashed(left, keys[i + 1])) % sides[1]
        result[outside] = left + right * sides[0]
        outside = result >= count
    return result


def hashed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return 63 bits of x ^ key, mixed by the finalizer of SplitMix64 [Steele, Lea & Flood 2014]; (n,) uint64."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)  # room for the sum
