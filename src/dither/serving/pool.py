"""Which models are in memory, and who waits for one.

A request leases an engine.  A model that is not in memory is loaded; requests for it that come meanwhile
wait for the same load.  Where the predicted memory of all would exceed the budget, the model that was used
longest ago is unloaded first, never one that somebody uses; if all are used, the request waits at a door,
and everybody who comes later waits behind it, so that a busy model cannot keep another out forever.

At most `queue` requests wait, for whatever reason; the next one is told to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from dither.engines.protocol import Engine
from dither.errors import DitherError
from dither.serving.errors import SERVER, ApiError, busy
from dither.serving.models import Served

Loader = Callable[[Served, bool], Awaitable[Engine]]


@dataclass(eq=False)
class Place:
    """A model for one purpose, in memory or not."""

    model: Served
    embeddings: bool
    engine: Engine | None = None
    loading: asyncio.Task[Engine] | None = None
    users: int = 0  # requests that run in it or wait for a slot of it
    running: int = 0
    used: float = 0.0
    loads: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def need(self) -> int:
        return self.model.needs(self.embeddings)

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.engine.alive

    @property
    def held(self) -> bool:
        return self.engine is not None or self.loading is not None


class Pool:
    def __init__(self, models: Sequence[Served], budget: int, queue: int, load: Loader) -> None:
        self.places = [Place(model, embeddings) for model in models for embeddings in (False, True)]
        self.budget, self.queue = budget, queue
        self.waiting = 0
        self._load = load
        self._door = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()

    @property
    def running(self) -> int:
        return sum(place.running for place in self.places)

    @property
    def held_bytes(self) -> int:
        return sum(place.need for place in self.places if place.held)

    def place(self, model: Served, embeddings: bool) -> Place:
        return next(p for p in self.places if p.model is model and p.embeddings == embeddings)

    @asynccontextmanager
    async def lease(self, model: Served, embeddings: bool = False) -> AsyncIterator[Engine]:
        """A slot of the model's engine.

        Raises ApiError: 429 where too many wait, 503 where the model cannot be loaded."""
        place = self.place(model, embeddings)
        if self.waiting >= self.queue and self._would_wait(place):
            raise busy(self.waiting)
        self.waiting += 1
        entered = False
        try:
            try:
                async with self._door:
                    await self._admit(place)
                    entered = True
                engine = await self._loaded(place)
                slots = place.slots  # a model that is loaded again gets new ones
                await slots.acquire()
            finally:
                self.waiting -= 1
            place.running += 1
            try:
                yield engine
            finally:
                place.running -= 1
                slots.release()
        finally:
            if entered:
                place.users -= 1
                place.used = time.monotonic()
                self._changed.set()

    def _would_wait(self, place: Place) -> bool:
        return not place.ready or place.slots.locked() or self._door.locked()

    async def _admit(self, place: Place) -> None:
        """Counts one more user, and sees to it that the model is in memory or on its way."""
        if place.engine is not None and not place.engine.alive:
            await self._unload(place)
        if not place.held:
            await self._make_room(place.need)
            place.loading = asyncio.ensure_future(self._start(place))
            place.loading.add_done_callback(_seen)
        place.users += 1

    async def _start(self, place: Place) -> Engine:
        try:
            engine = await self._load(place.model, place.embeddings)
            place.engine, place.slots = engine, asyncio.Semaphore(engine.slots)
            place.loads += 1
            return engine
        finally:
            place.loading = None
            self._changed.set()

    async def _loaded(self, place: Place) -> Engine:
        if place.loading is not None:
            try:
                await asyncio.shield(place.loading)
            except (DitherError, OSError) as error:
                raise ApiError(503, str(error), SERVER, "model_not_loaded") from error
        if place.engine is None:  # it failed while this request stood in line for it
            raise ApiError(503, f"{place.model.name} could not be loaded", SERVER, "model_not_loaded")
        return place.engine

    async def _make_room(self, need: int) -> None:
        """A model that is larger than the budget all by itself is loaded alone."""
        while self.held_bytes and self.held_bytes + need > self.budget:
            idle = [place for place in self.places if place.engine is not None and not place.users]
            if idle:
                await self._unload(min(idle, key=lambda place: place.used))
                continue
            self._changed.clear()
            await self._changed.wait()

    async def _unload(self, place: Place) -> None:
        engine, place.engine = place.engine, None
        if engine is not None:
            await engine.close()

    async def close(self) -> None:
        for place in self.places:
            if place.loading is not None:
                place.loading.cancel()
                await asyncio.gather(place.loading, return_exceptions=True)
            await self._unload(place)


def _seen(task: asyncio.Task[Engine]) -> None:
    """Everybody who waited may have left; a failure is then nobody's."""
    if not task.cancelled():
        task.exception()
