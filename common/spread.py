"""Choose evenly spread indices."""


def evenly(n: int, total: int) -> list[int]:
    """Choose n of the indices 0 … total - 1, evenly spread and in order; all of them if there are no more than n.

    evenly(3, 10) → [0, 3, 6];  evenly(5, 2) → [0, 1]
    """
    n = min(n, total)
    return [i * total // n for i in range(n)]
