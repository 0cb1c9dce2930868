"""Which requests run, in which place of the batch and on which pages; plain Python, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from undivided.engine.sampling import Sampling


class PagePool:
    """The pages of a cache that are free.

    Args:
        num_pages: pages altogether, numbered from 0.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1.")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = [True] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Returns `count` pages, or None, taking none, if fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Takes pages back.

        Raises:
            ValueError: a page is not of this pool, or is free already.
        """
        for page in pages:
            if not 0 <= page < self.num_pages or self._is_free[page]:
                raise ValueError(f"page {page} is not in use; the pool has pages 0 to {self.num_pages - 1}.")
            self._is_free[page] = True
            self._free.append(page)


@dataclass(eq=False)
class Request:
    """One prompt on its way.

    Args:
        index: of the prompt among those given.
        prompt: token ids, at least one.
        max_new_tokens: longest continuation.
        sampling: how tokens are chosen.
    """

    index: int
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    place: int = -1
    pages: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Cache rows that it may come to need: a step may be under way when its last token is read."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def num_cached(self) -> int:
        """Cache rows that are filled once all tokens so far have been read by the model but the last one."""
        return len(self.prompt) + len(self.tokens) - 1


class Scheduler:
    """Admits requests in their order, as soon as a place in the batch and all pages they may need are free.

    A request that runs can therefore always finish: nothing is preempted, and nothing waits for another's end while
    it holds pages.

    Args:
        max_batch: places in the batch.
        max_tokens: longest sequence, prompt and continuation together.
        num_pages: pages of the pool.
        page_size: rows of a page.
    """

    def __init__(self, max_batch: int, max_tokens: int, num_pages: int, page_size: int) -> None:
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}

    def pages_for(self, rows: int) -> int:
        """Pages that so many rows take."""
        return -(-rows // self.page_size)

    def check(self, request: Request) -> None:
        """Raises a ValueError that says what would fit, if the request can never run."""
        if not request.prompt:
            raise ValueError(f"prompt {request.index} has no tokens; give at least one.")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={request.max_new_tokens} must be at least 1.")
        what = f"prompt {request.index} has {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens}"
        if request.num_rows > self.max_tokens:
            raise ValueError(
                f"{what}: together {request.num_rows}, more than the engine's max_tokens={self.max_tokens}."
            )
        needed = self.pages_for(request.num_rows)
        if needed > self.pool.num_pages:
            raise ValueError(
                f"{what}: that takes {needed} pages of {self.page_size} rows, and the pool has "
                f"{self.pool.num_pages}; make cache_tokens at least {needed * self.page_size}."
            )

    def add(self, requests: Sequence[Request]) -> None:
        """Puts requests behind those that wait.

        Raises:
            ValueError: one of them can never run; then none is added.
        """
        for request in requests:
            self.check(request)
        self.waiting.extend(requests)

    def admit(self) -> list[Request]:
        """Moves waiting requests into the batch, the first ones first, and returns them."""
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            pages = self.pool.allocate(self.pages_for(self.waiting[0].num_rows))
            if pages is None:
                break
            request = self.waiting.popleft()
            request.pages = pages
            request.place = next(place for place in range(self.max_batch) if place not in self.running)
            self.running[request.place] = request
            admitted.append(request)
        return admitted

    def finish(self, request: Request) -> None:
        """Takes a request out of the batch and its pages back."""
        del self.running[request.place]
        self.pool.release(request.pages)
        request.pages = []

    def clear(self) -> None:
        """Forgets all requests, as when nobody reads their tokens any more."""
        for request in list(self.running.values()):
            self.finish(request)
        self.waiting.clear()

    @property
    def places(self) -> int:
        """Places of the batch up to the last one in use."""
        return max(self.running, default=-1) + 1


def batch_bucket(places: int, max_batch: int) -> int:
    """Returns the batch size that a step of so many places runs at: the next power of two, at most `max_batch`."""
    return min(1 << max(places - 1, 0).bit_length(), max_batch)
