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
from operator import attrgetter

from dither.engines.protocol import Engine
from dither.errors import DitherError
from dither.serving.errors import RETRY, SERVER, ApiError
from dither.serving.models import ServedModel

Loader = Callable[[ServedModel, bool], Awaitable[Engine]]


@dataclass(eq=False)
class PooledModel:
    """A model for one purpose, in memory or not."""

    model: ServedModel
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
    def __init__(self, models: Sequence[ServedModel], budget: int, queue: int, load: Loader) -> None:
        self.models = [PooledModel(model, embeddings) for model in models for embeddings in (False, True)]
        self.budget, self.queue = budget, queue
        self.waiting = 0
        self._load = load
        self._door = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()

    @property
    def running(self) -> int:
        return sum(pooled.running for pooled in self.models)

    @property
    def held_bytes(self) -> int:
        return sum(pooled.need for pooled in self.models if pooled.held)

    @asynccontextmanager
    async def lease(self, model: ServedModel, embeddings: bool = False) -> AsyncIterator[Engine]:
        """A slot of the model's engine.

        Raises ApiError: 429 where too many wait, 503 where the model cannot be loaded."""
        pooled = next(each for each in self.models if each.model is model and each.embeddings == embeddings)
        would_wait = not pooled.ready or pooled.slots.locked() or self._door.locked()
        if would_wait and self.waiting >= self.queue:
            message = (
                f"{self.waiting} requests are waiting already, which is the most that this server lets wait; "
                "try again shortly"
            )
            raise ApiError(429, message, "rate_limit_error", "queue_full", retry_after=RETRY)
        self.waiting += 1
        entered = False
        try:
            try:
                async with self._door:
                    await self._admit(pooled)
                    entered = True
                engine = await self._loaded(pooled)
                slots = pooled.slots  # a model that is loaded again gets new ones
                await slots.acquire()
            finally:
                self.waiting -= 1
            pooled.running += 1
            try:
                yield engine
            finally:
                pooled.running -= 1
                slots.release()
        finally:
            if entered:
                pooled.users -= 1
                pooled.used = time.monotonic()
                self._changed.set()

    async def _admit(self, pooled: PooledModel) -> None:
        """Counts one more user, and sees to it that the model is in memory or on its way."""
        if pooled.engine is not None and not pooled.engine.alive:
            await self._unload(pooled)
        if not pooled.held:
            await self._make_room(pooled.need)
            pooled.loading = asyncio.ensure_future(self._start(pooled))
            # everybody who waited may have left; a failure is then nobody's
            pooled.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        pooled.users += 1

    async def _start(self, pooled: PooledModel) -> Engine:
        try:
            engine = await self._load(pooled.model, pooled.embeddings)
            pooled.engine, pooled.slots = engine, asyncio.Semaphore(engine.slots)
            pooled.loads += 1
            return engine
        finally:
            pooled.loading = None
            self._changed.set()

    async def _loaded(self, pooled: PooledModel) -> Engine:
        if pooled.loading is not None:
            try:
                await asyncio.shield(pooled.loading)
            except (DitherError, OSError) as error:
                raise ApiError(503, str(error), SERVER, "model_not_loaded") from error
        if pooled.engine is None:  # it failed while this request stood in line for it
            raise ApiError(503, f"{pooled.model.name} could not be loaded", SERVER, "model_not_loaded")
        return pooled.engine

    async def _make_room(self, need: int) -> None:
        """A model that is larger than the budget all by itself is loaded alone."""
        while self.held_bytes and self.held_bytes + need > self.budget:
            idle = [pooled for pooled in self.models if pooled.engine is not None and not pooled.users]
            if idle:
                await self._unload(min(idle, key=attrgetter("used")))
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _unload(self, pooled: PooledModel) -> None:
        engine, pooled.engine = pooled.engine, None
        if engine is not None:
            await engine.close()

    async def close(self) -> None:
        for pooled in self.models:
            if pooled.loading is not None:
                pooled.loading.cancel()
                await asyncio.gather(pooled.loading, return_exceptions=True)
            await self._unload(pooled)
