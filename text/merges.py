"""Learn the merges of byte-pair encoding in numpy, as fast as native code does.

The algorithm merges the most frequent pair, again and again [Sennrich et al. 2016]. Of equally frequent pairs the
oldest goes first: the one whose newer token is older, then the one whose older token is older, then the one with the
newer token on the left. So the result depends on the text alone. Two things make it fast: a table lists the places of
each pair, so the text is never searched; and hundreds of merges that do not affect each other are done at once.
"""

import sys

import numpy as np
from numpy import ndarray
from tqdm import tqdm

NEVER = -(1 << 60)  # the count of a pair that must not be merged (again)


class Learner:
    """The chunks of a corpus as tokens, which every merge makes fewer, and a table of the pairs of neighbours.

    The chunks: `symbol[p]` is the token at place p, -1 if it has become part of the token before it; `after[p]` and
    `before[p]` are the neighbouring places in the chunk, 0 at its ends; `weight[p]` is how often the chunk occurs.
    The table: pair i has the key `key[i]` (see `pair_key`) and occurs `count[i]` times in the corpus. The places
    `place[first[i]:first[i + 1]]` are those of its left token; some of them hold other tokens by now. A key begins
    with the newer of the pair's two tokens. All occurrences of a pair arise when that token is made, so the pairs of a
    new token are appended to the table, and the table stays sorted by key.

    For the chunk "aab" and the merge of a and b: places 1 2 3 hold a a b; after it they hold a, ab and -1.
    """

    def __init__(self, chunks: dict[bytes, int], max_token_length: int):
        sizes = np.array([len(chunk) for chunk in chunks])
        ends = np.cumsum(sizes)  # places count from 1
        self.symbol = np.concatenate(([-1], np.frombuffer(b"".join(chunks), np.uint8))).astype(np.int32)
        self.weight = np.concatenate(([0], np.repeat(np.array(list(chunks.values()), np.int64), sizes)))
        self.after = np.arange(1, len(self.symbol) + 1, dtype=np.int32)
        self.before = np.arange(-1, len(self.symbol) - 1, dtype=np.int32)
        self.after[ends] = self.before[ends - sizes + 1] = self.after[0] = self.before[0] = 0
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.known, self.max_token_length = set(self.tokens), max_token_length
        self.key, self.count, self.first = (np.empty(0, np.int64) for _ in range(3))
        self.place, self.pairs, self.places = np.empty(0, np.int32), 0, 0
        self.candidates, self.threshold = np.empty(0, np.int64), sys.maxsize
        self.scratch = np.zeros(len(self.symbol), np.int32)  # zeros, between uses
        self.add_pairs(np.flatnonzero(self.after))

    def pair_key(self, left: ndarray, right: ndarray) -> ndarray:
        """Return the key of each pair: (newer token, older token, whether the older one is on the left) as one number.

        left, right: (pairs,) token ids; newer tokens have larger ids.
        The pair (97, 256) has the key 256 << 33 | 97 << 1 | 1, and the pair (256, 97) has 256 << 33 | 97 << 1.
        """
        newer, older = np.maximum(left, right).astype(np.int64), np.minimum(left, right)
        return newer << 33 | older.astype(np.int64) << 1 | (left < right)

    def pair_ends(self, pairs: ndarray) -> tuple[ndarray, ndarray]:
        """Return the left tokens and the right tokens, (n,) each, of the pairs with these numbers, (n,)."""
        key = self.key[pairs]
        newer, older, older_left = key >> 33, key >> 1 & 0xFFFFFFFF, (key & 1).astype(bool)
        return np.where(older_left, older, newer), np.where(older_left, newer, older)

    def add_pairs(self, lefts: ndarray) -> None:
        """Append the pairs whose left tokens are at these places; none of these pairs is in the table yet."""
        key = self.pair_key(self.symbol[lefts], self.symbol[self.after[lefts]])
        order = np.argsort(key)
        key, lefts = key[order], lefts[order]
        starts = starts_of(key)
        pairs, places = self.pairs + len(starts), self.places + len(lefts)
        self.key, self.count, self.first = (grown(a, pairs + 1) for a in (self.key, self.count, self.first))
        self.place = grown(self.place, places)
        self.key[self.pairs : pairs] = key[starts]
        if len(starts):
            self.count[self.pairs : pairs] = np.add.reduceat(self.weight[lefts], starts)
        self.first[self.pairs : pairs + 1] = np.append(starts, len(lefts)) + self.places
        self.place[self.places : places] = lefts
        new = np.arange(self.pairs, pairs)
        self.candidates = np.concatenate((self.candidates, new[self.count[new] >= self.threshold]))
        self.pairs, self.places = pairs, places

    def most_frequent(self, limit: int) -> ndarray:
        """Return at most `limit` pairs with the highest counts, highest first; of equals the oldest first.

        Only the candidates are searched: all pairs whose count is at least `threshold`. When no candidate is left, the
        threshold is lowered.
        """
        self.candidates = self.candidates[self.count[self.candidates] >= max(1, self.threshold)]
        if not len(self.candidates):
            count = self.count[: self.pairs]
            rank = max(0, len(count) - 2048)
            self.threshold = max(1, int(np.partition(count, rank)[rank])) if len(count) else 1
            self.candidates = np.flatnonzero(count >= self.threshold)
        pairs = self.candidates  # oldest first
        if len(pairs) > limit:
            count = self.count[pairs]
            last = np.partition(count, -limit)[-limit]
            sure, tied = pairs[count > last], pairs[count == last]
            pairs = np.concatenate((sure, tied[: limit - len(sure)]))
        return pairs[np.argsort(-self.count[pairs], kind="stable")]

    def next_batch(self, limit: int) -> list[tuple[int, int, int]]:
        """Return the pairs to merge next as (pair, left, right), by their present counts; [] if none is left.

        Pairs whose token already exists, or would be too long, must never be merged: their count becomes NEVER.
        """
        batch, new, pairs = [], set(), self.most_frequent(limit)
        for pair, left, right in zip(pairs.tolist(), *(ends.tolist() for ends in self.pair_ends(pairs)), strict=True):
            token = self.tokens[left] + self.tokens[right]
            if token in self.known or len(token) > self.max_token_length:
                self.count[pair] = NEVER
            elif token in new:  # a merge of this batch would make the same token
                break
            else:
                batch.append((pair, left, right))
                new.add(token)
        return batch if batch or not len(pairs) else self.next_batch(limit)

    def merge(self, batch: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Do as many merges of the batch at once as possible; returns (left, right, count) of each merge done.

        The result equals that of merging one by one. A pair that shares an occurrence of a token with an earlier pair
        of the batch becomes rarer when the earlier pair is merged, so it is put off to a later batch (see `clashes`).
        The batch ends before the first pair that may be rarer than a pair that was put off, or than a pair with a new
        token (see `highest_new`).
        """
        pairs, left, right = np.array(batch).T
        count = self.count[pairs]
        # The present occurrences: p and q are the places of the two tokens, j the pair's number in the batch
        first, last = self.first[pairs].tolist(), self.first[pairs + 1].tolist()
        sizes = self.first[pairs + 1] - self.first[pairs]
        p = np.concatenate([self.place[a:b] for a, b in zip(first, last, strict=True)]).astype(np.intp)
        q = self.after[p].astype(np.intp)
        current = self.symbol[p] == np.repeat(left.astype(np.int32), sizes)
        current &= self.symbol[q] == np.repeat(right.astype(np.int32), sizes)
        current = np.flatnonzero(current)
        p, q, j = p[current], q[current], np.repeat(np.arange(len(pairs)), sizes)[current]
        taken = np.ones(len(p), bool)
        if (left == right).any():  # aaaa has three pairs aa: merge every second one of a run
            twins = np.flatnonzero((left == right)[j])
            twins = twins[np.lexsort((p[twins], j[twins]))]
            index = np.arange(len(twins))
            runs_on = np.append(False, (p[twins[1:]] == q[twins[:-1]]) & (j[twins[1:]] == j[twins[:-1]]))
            taken[twins] = (index - np.maximum.accumulate(np.where(runs_on, 0, index))) % 2 == 0
        put_off, threat = self.clashes(p, q, j, taken, len(batch))
        mine = taken & ~put_off[j]
        p, q, j = p[mine], q[mine], j[mine]
        self.highest_new(p, q, j, threat)
        # Pair i must wait if one of the merges before it makes or leaves a pair that may be more frequent
        late = np.flatnonzero(count[1:] < np.maximum.accumulate(threat)[:-1])
        safe = int(late[0]) + 1 if len(late) else len(batch)
        done = np.flatnonzero(~put_off[:safe])
        number = np.cumsum(~put_off) - 1
        mine = j < safe
        self.replace(p[mine], q[mine], number[j[mine]])
        self.count[pairs[done]] = NEVER
        merges = [(*batch[i][1:], int(count[i])) for i in done.tolist()]
        self.tokens += [self.tokens[a] + self.tokens[b] for a, b, _ in merges]
        self.known.update(self.tokens[-len(merges) :])
        return merges

    def clashes(self, p: ndarray, q: ndarray, j: ndarray, taken: ndarray, size: int) -> tuple[ndarray, ndarray]:
        """Find the pairs of the batch that share an occurrence of a token with a pair that is merged before them.

        p, q, j: (occurrences,) the places of the left and the right token, and the pair's number in the batch.
        taken: (occurrences,) whether the occurrence is merged; of the three pairs aa in aaaa, the middle one is not.
        size: the number of pairs in the batch. Returns two arrays (size,): put_off, whether the pair is put off; and
        threat, the lowest count with which a later pair may still be merged in this batch: one more than what is left
        of a pair that is put off, 0 for all other pairs.

        Example: the chunks abc x3, bc x2, ab x1, and the batch (b c), which occurs 5 times, (a b), which occurs 4
        times. Merging b and c takes the b out of every abc, so (a b) is put off. It is left only once, in the chunk ab:
        put_off = [False, True], threat = [0, 2]. A third pair that occurs twice may be merged in this batch. If it
        occurs once, the batch ends before it, because (a b) may come first.
        """
        put_off, threat = np.zeros(size, bool), np.zeros(size, np.int64)
        self.scratch[q] = j + 1
        other = self.scratch[p] - 1  # the pair whose right token is the left token of this one, -1 if there is none
        self.scratch[q] = 0
        meet = np.flatnonzero((other >= 0) & (other != j))
        if len(meet):
            low, high = np.minimum(other[meet], j[meet]), np.maximum(other[meet], j[meet])
            for edge in np.unique((high * size + low).astype(np.int32)).tolist():  # in the order of the later pair
                if not put_off[edge % size]:
                    put_off[edge // size] = True
            merged, late = taken & ~put_off[j], put_off[j]
            self.scratch[p[merged]] = self.scratch[q[merged]] = j[merged] + 1
            owners = np.stack((self.scratch[p[late]], self.scratch[q[late]]))
            left_over = ((owners == 0) | (owners > j[late])).all(0)
            self.scratch[p[merged]] = self.scratch[q[merged]] = 0
            np.add.at(threat, j[late][left_over], self.weight[p[late]][left_over])
            threat[put_off] += 1
        return put_off, threat

    def highest_new(self, p: ndarray, q: ndarray, j: ndarray, highest: ndarray) -> None:
        """Raise highest[j] to an upper bound of the counts of the pairs with the new token of merge j.

        p, q, j: (occurrences,) as in `clashes`, of the merges that are done. highest: (batch,), changed in place.
        The bound of a new pair is the number of times that its other token now stands beside the merge, on that side:
        the other merges of the batch can only take some of these neighbours away.

        Example: merging a and b in the chunks xab x3, yab x2, abz x4 makes (x ab) 3 times, (y ab) 2 times and (ab z)
        4 times, so that highest[j] becomes at least 4.
        """
        beside = [(self.before[p], 0), (self.after[q], 1)]
        key = np.concatenate([(j << 33 | side << 32 | self.symbol[at])[at > 0] for at, side in beside])
        weight = np.concatenate([self.weight[p][at > 0] for at, _ in beside])
        if len(key):
            order = np.argsort(key)
            key = key[order]
            starts = starts_of(key)
            np.maximum.at(highest, key[starts] >> 33, np.add.reduceat(weight[order], starts))

    def replace(self, p: ndarray, q: ndarray, j: ndarray) -> None:
        """Put the new token number j at each place p and -1 at q; update the links and the table of pairs.

        p, q, j: (occurrences,) places of left and right tokens, and numbers of the new tokens. Example: in the chunk
        xaby the merge of a and b leaves x ab -1 y. The pairs (x a) and (b y) lose this occurrence, and the new pairs
        (x ab) and (ab y) are added to the table.
        """
        before, after = self.before[p], self.after[q]
        self.scratch[q] = 1
        on_left = (before > 0) & (self.scratch[before] == 0)  # else it is the pair on the right of another merge
        on_right = after > 0
        self.scratch[q] = 0
        old = (self.pair_key(self.symbol[before], self.symbol[p])[on_left],
               self.pair_key(self.symbol[q], self.symbol[after])[on_right])  # fmt: skip
        lost = np.searchsorted(self.key[: self.pairs], np.concatenate(old))
        np.subtract.at(self.count, lost, np.concatenate((self.weight[p][on_left], self.weight[p][on_right])))
        self.symbol[p], self.symbol[q] = len(self.tokens) + j, -1
        self.after[p] = after
        self.before[after[on_right]] = p[on_right]
        self.add_pairs(np.concatenate((before[on_left], p[on_right])))


def starts_of(sorted_keys: ndarray) -> ndarray:
    """Return the index at which each run of equal keys begins: [3, 3, 5, 8, 8] → [0, 2, 3]."""
    return np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1]))[: len(sorted_keys)])


def grown(array: ndarray, size: int) -> ndarray:
    """Return the array if it has room for `size` items, else a copy with at least twice the room."""
    return array if len(array) >= size else np.concatenate((array, np.empty(max(size, len(array)), array.dtype)))


def learn_merges(
    chunks: dict[bytes, int], number: int, max_token_length: int | None = None, progress: bool = False
) -> list[tuple[int, int, int]]:
    """Learn `number` merges (left, right, count) from chunks and their counts; fewer if nothing is left to merge.

    Merge n makes token 256 + n from the tokens left and right, which were neighbours count times; tokens below 256 are
    the bytes. max_token_length: in bytes; None for no limit. For the chunk "aab" once: [(97, 97, 1), (256, 98, 1)].
    """
    merges: list[tuple[int, int, int]] = []
    learner = Learner({chunk: n for chunk, n in chunks.items() if chunk}, max_token_length or sys.maxsize)
    size = 16
    with tqdm(total=number, unit="merge", desc="merge", disable=None if progress else True) as bar:
        while len(merges) < number and (batch := learner.next_batch(min(size, number - len(merges)))):
            done = learner.merge(batch)
            merges += done
            size = min(4096, max(16, 2 * len(done)))
            bar.update(len(done))
    return merges
