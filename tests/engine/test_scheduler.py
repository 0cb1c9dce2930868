from __future__ import annotations

import random

import pytest

from undivided.engine.sampling import Sampling
from undivided.engine.scheduler import PagePool, Request, Scheduler, batch_bucket


def request(index: int, tokens: int, new: int = 4) -> Request:
    return Request(index, list(range(tokens)), new, Sampling())


def scheduler(**sizes: int) -> Scheduler:
    return Scheduler(**{"max_batch": 4, "max_tokens": 64, "num_pages": 8, "page_size": 8, **sizes})


def test_no_page_has_two_owners_and_none_is_lost() -> None:
    pool, held, draw = PagePool(37), [], random.Random(0)
    for _ in range(500):
        if held and draw.random() < 0.5:
            pool.release(held.pop(draw.randrange(len(held))))
        elif (pages := pool.allocate(draw.randrange(1, 9))) is not None:
            held.append(pages)
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned)
        assert len(owned) + pool.num_free == 37
    assert set(owned) <= set(range(37))


def test_what_does_not_fit_takes_nothing() -> None:
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(pool.allocate(3)) == [0, 1, 2]


@pytest.mark.parametrize("page", [-1, 0, 2, 3])
def test_a_page_that_nobody_holds_is_not_taken_back(page: int) -> None:
    pool = PagePool(3)
    pool.release(pool.allocate(3))
    with pytest.raises(ValueError, match=f"page {page} is not in use; the pool has pages 0 to 2"):
        pool.release([page])


def test_requests_run_in_their_order_as_pages_come_free() -> None:
    batch = scheduler()
    # 3, 3, 3 and 1 pages of 8: the third does not fit beside the first two, and the fourth waits behind it.
    requests = [request(0, 20), request(1, 20), request(2, 20), request(3, 4)]
    batch.add(requests)
    assert batch.admit() == requests[:2]
    assert batch.admit() == []
    batch.finish(requests[1])
    assert batch.admit() == requests[2:]
    assert [r.place for r in requests] == [0, 1, 1, 2]
    assert batch.pool.num_free == 8 - 3 - 3 - 1


def test_a_full_batch_admits_nobody() -> None:
    batch = scheduler(max_batch=2)
    batch.add([request(i, 4) for i in range(3)])
    assert len(batch.admit()) == 2
    assert batch.admit() == []


def test_pages_cover_a_step_behind_the_last_token() -> None:
    # 5 tokens and 4 new ones: rows 0 to 7 are needed, and row 8 by the step that runs while the last is read.
    batch = scheduler()
    batch.add([request(0, 5, 4)])
    assert len(batch.admit()[0].pages) == 2


@pytest.mark.parametrize(
    ("sizes", "new", "text"),
    [
        (
            {},
            45,
            r"prompt 3 has 20 tokens and max_new_tokens=45: together 65, more than the engine's max_tokens=64",
        ),
        (
            {"num_pages": 2},
            4,
            r"that takes 3 pages of 8 rows, and the pool has 2; make cache_tokens at least 24",
        ),
        ({}, 0, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_what_can_never_run_is_refused_with_what_would(sizes, new, text) -> None:
    batch = scheduler(**sizes)
    with pytest.raises(ValueError, match=text):
        batch.add([request(2, 4), request(3, 20, new)])
    assert not batch.waiting


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        scheduler().add([request(1, 0)])


@pytest.mark.parametrize(("places", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
def test_a_step_runs_at_the_next_power_of_two(places: int, bucket: int) -> None:
    assert batch_bucket(places, max_batch=12) == bucket
