"""Who is loaded and who waits, with engines that only count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dither.engines.llamacpp import EngineError
from dither.engines.settings import Wishes
from dither.serving.errors import ApiError
from dither.serving.models import ServedModel
from dither.serving.pool import Pool


class Counting:
    context, takes_tools, takes_schemas, takes_embeddings = 100, True, True, True

    def __init__(self, log: list[str], name: str, slots: int) -> None:
        self.log, self.name, self.slots, self.alive = log, name, slots, True

    async def metrics(self) -> str:
        return ""

    async def ask(self, path: str, body: Any) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self.alive = False
        self.log.append(f"-{self.name}")


class World:
    def __init__(self, needs: dict[str, int], budget: int, queue: int = 100, slots: int = 2) -> None:
        self.log: list[str] = []
        self.failing = False
        base = ServedModel("", Path(), "llamacpp", 0, "", 100, slots, None, 0, Wishes())
        self.models = {name: replace(base, name=name, need=need) for name, need in needs.items()}
        self.pool = Pool(list(self.models.values()), budget, queue, self.load)

    async def load(self, model: ServedModel, embeddings: bool) -> Any:
        await asyncio.sleep(0)
        if self.failing:
            raise EngineError(model.name, "is broken")
        self.log.append(f"+{model.name}")
        return Counting(self.log, model.name, model.slots)

    async def use(self, name: str, until: asyncio.Event | None = None) -> None:
        async with self.pool.lease(self.models[name]):
            await (until.wait() if until else asyncio.sleep(0))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_the_one_used_longest_ago_goes_first() -> None:
    async def test() -> None:
        world = World({"a": 40, "b": 40, "c": 40}, budget=100)
        for name in "abac":
            await world.use(name)
        assert world.log == ["+a", "+b", "-b", "+c"]
        assert world.pool.held_bytes == 80

    run(test)


def test_what_is_in_use_stays_and_nobody_overtakes_who_waits_for_room() -> None:
    async def test() -> None:
        world = World({"a": 60, "b": 60}, budget=100)
        done = asyncio.Event()
        first = asyncio.ensure_future(world.use("a", done))
        await settle()
        waits = asyncio.ensure_future(world.use("b"))
        await settle()
        later = asyncio.ensure_future(world.use("a"))
        await settle()
        assert world.log == ["+a"] and world.pool.waiting == 2
        done.set()
        await asyncio.gather(first, waits, later)
        assert world.log == ["+a", "-a", "+b", "-b", "+a"]

    run(test)


def test_requests_for_a_model_that_is_loading_share_the_load() -> None:
    async def test() -> None:
        world = World({"a": 60}, budget=100, slots=3)
        await asyncio.gather(*(world.use("a") for _ in range(9)))
        assert world.log == ["+a"] and world.pool.running == world.pool.waiting == 0

    run(test)


def test_a_model_larger_than_the_budget_is_loaded_alone() -> None:
    async def test() -> None:
        world = World({"a": 60, "huge": 500}, budget=100)
        for name in ("a", "huge", "a"):
            await world.use(name)
        assert world.log == ["+a", "-a", "+huge", "-huge", "+a"]

    run(test)


def test_beyond_the_queue_requests_are_refused() -> None:
    async def test() -> None:
        world = World({"a": 1}, budget=100, queue=3, slots=1)
        done = asyncio.Event()
        tasks = [asyncio.ensure_future(world.use("a", done))]
        await settle()
        tasks += [asyncio.ensure_future(world.use("a", done)) for _ in range(3)]
        await settle()
        with pytest.raises(ApiError) as refusal:
            await world.use("a")
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
        tasks[3].cancel()
        await settle()
        tasks.append(asyncio.ensure_future(world.use("a", done)))  # there is a place again
        done.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert world.pool.waiting == world.pool.running == 0

    run(test)


def test_a_load_that_fails_is_told_to_all_and_tried_again() -> None:
    async def test() -> None:
        world = World({"a": 1}, budget=100)
        world.failing = True
        found = await asyncio.gather(*(world.use("a") for _ in range(3)), return_exceptions=True)
        assert [error.status for error in found if isinstance(error, ApiError)] == [503] * 3
        world.failing = False
        await world.use("a")
        assert world.log == ["+a"]

    run(test)


def test_an_engine_that_died_is_loaded_again() -> None:
    async def test() -> None:
        world = World({"a": 1}, budget=100)
        await world.use("a")
        engine = world.pool.models[0].engine
        assert engine is not None
        engine.alive = False  # type: ignore[misc]
        await world.use("a")
        assert world.log == ["+a", "-a", "+a"]

    run(test)


def test_cancelled_at_every_stage_nothing_is_lost() -> None:
    async def test() -> None:
        world = World({"a": 60, "b": 60}, budget=100, slots=1)
        for stop_after in range(8):
            done = asyncio.Event()
            tasks = [asyncio.ensure_future(world.use(name, done)) for name in "aabab"]
            for _ in range(stop_after):
                await asyncio.sleep(0)
            for task in tasks[1:]:
                task.cancel()
            done.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            await settle()
            assert world.pool.waiting == world.pool.running == 0
            assert all(held.users == 0 for held in world.pool.models)
        await world.use("b")
        await world.use("a")

    run(test)
