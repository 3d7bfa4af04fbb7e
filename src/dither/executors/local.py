"""Tasks over the cores of this machine.

Kernels release the GIL, so threads are enough and share the memory map.  What matters is how many
tasks are in flight: each holds a chunk of weights, so the window bounds peak memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """`function(item)` for every item, results as they finish, at most `threads` + 1 in flight.

    The first error stops the rest and is raised; closing the generator stops them too, and waits for
    those that run.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dither")
    waiting, pending = iter(items), set[Future[Result]]()
    try:
        while pending := pending | {
            pool.submit(function, item) for item in islice(waiting, threads + 1 - len(pending))
        }:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
