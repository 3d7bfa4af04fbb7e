"""Servers that the tests share: each is real, with llama.cpp behind it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from llama_util import CHATML, IM_END, SPECIAL, TinyLlama
from serving_util import CALLER, THINKER

import dither


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """caller: calls a tool where one is offered; thinker: thinks, if a grammar makes it; endless: writes
    abcabc… for as long as it may."""
    folder = tmp_path_factory.mktemp("served")
    newline = len(SPECIAL) + ord("\n")
    caller = TinyLlama(chat_template=CALLER, context=4096).parrot(newline, "<fn>", end=IM_END)
    caller.write(folder / "caller.gguf")
    TinyLlama(chat_template=THINKER, context=4096).write(folder / "thinker.gguf")
    endless = TinyLlama(chat_template=CHATML, context=2**16)
    endless.parrot(newline, "abc", end=len(SPECIAL) + ord("a"))
    endless.write(folder / "endless.gguf")
    return folder


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships with Dither, as Q4_K_M."""
    path = tmp_path_factory.mktemp("bundled") / "dither-demo.gguf"
    dither.quantize(str(files("dither") / "demo_model"), "Q4_K_M", path)
    return path


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[dither.Server]:
    """Three models by name, two slots each, a queue of four."""
    paths = [models / f"{name}.gguf" for name in ("thinker", "caller", "endless")]
    with dither.serve(paths, context=1024, slots=2, queue=4, threads=1, grammars=True) as server:
        yield server


@pytest.fixture(scope="session")
def url(server: dither.Server) -> str:
    return server.url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client
