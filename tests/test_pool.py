"""The pool of processes: results in order, errors as they are, no more in flight than is allowed."""

import os

import pytest

from text.pool import parallel_map


@pytest.mark.parametrize("workers, few", [(1, 4), (2, 4), (3, 0), (2, 100)])
def test_results_come_in_order_and_a_few_tasks_at_a_time(workers, few):
    drawn = 0

    def tasks():
        nonlocal drawn
        for i in range(60):
            drawn += 1
            yield str(i)

    for done, result in enumerate(parallel_map(int, tasks(), workers, few=few)):
        assert result == done and drawn - done <= max(2 * workers + 1, few + 1)
    assert drawn == 60


def test_an_error_arrives_as_it_is():
    with pytest.raises(ValueError, match="invalid literal for int.*'x'"):
        list(parallel_map(int, ["1"] * 9 + ["x"], 2))


def test_a_killed_worker_is_told():
    with pytest.raises(ValueError, match="a worker process was killed.*fewer --workers"):
        list(parallel_map(os._exit, [1] * 9, 2))


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers=0: at least 1"):
        list(parallel_map(int, [], 0))
