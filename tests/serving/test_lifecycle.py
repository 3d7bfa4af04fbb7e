"""Beginnings, ends and accidents: clients that leave, engines that die, signals, files that do not load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_util import Answer, address, ask, connected, http, read_answer, says
from typer.testing import CliRunner

import dither
from dither.cli import app as command
from dither.engines import http_client
from dither.engines.llamacpp import EngineError
from dither.engines.processes import LlamaProcess
from dither.errors import UsageError
from dither.serving.access import read_keys

pytestmark = pytest.mark.slow  # real servers and engines: `make test` runs it, `make check` does not

CHAT = "/v1/chat/completions"
ENDLESS = {"messages": [{"role": "user", "content": "go"}], "temperature": 0, "stream": True}


def eventually(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def engine_of(server: dither.Server) -> LlamaProcess:
    engine = server.app.pool.models[0].engine
    assert isinstance(engine, LlamaProcess)
    return engine


def busy_slots(server: dither.Server) -> int:
    """By llama.cpp's own account."""
    loop = server.loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(slots_in_use(engine_of(server)), loop).result(20)


async def slots_in_use(engine: LlamaProcess) -> int:
    reply = await http_client.request(engine.address, engine.key, "/slots", None)
    found = json.loads(b"".join([piece async for piece in reply.pieces]))
    return sum(slot["is_processing"] for slot in found)


@pytest.fixture(scope="module")
def endless(models: Path) -> Iterator[dither.Server]:
    """One slot, a queue of one, an answer that goes on for a minute."""
    with dither.serve(models / "endless.gguf", context=60_000, slots=1, queue=1, threads=1) as server:
        yield server


def begun(url: str) -> contextlib.AbstractContextManager[socket.socket]:
    return connected(url, http(url, CHAT, ENDLESS))


def wait_for_bytes(connection: socket.socket, text: bytes = b"data:") -> None:
    got = b""
    while text not in got:
        piece = connection.recv(4096)
        assert piece
        got += piece


def test_a_client_that_hangs_up_frees_its_slot(endless: dither.Server) -> None:
    with begun(endless.url) as connection:
        wait_for_bytes(connection)
        assert busy_slots(endless) == 1 and endless.app.pool.running == 1
    eventually(lambda: not endless.app.active and busy_slots(endless) == 0)  # type: ignore[union-attr]
    assert endless.app.pool.running == 0 and endless.app.metrics.gone >= 1


def test_one_that_hangs_up_without_a_stream_does_too(endless: dither.Server) -> None:
    with connected(endless.url, http(endless.url, CHAT, {**ENDLESS, "stream": False})):
        eventually(lambda: busy_slots(endless) == 1)
    eventually(lambda: not endless.app.active and busy_slots(endless) == 0)  # type: ignore[union-attr]


def test_beyond_the_queue_there_is_429_and_a_time_to_return(endless: dither.Server) -> None:
    with begun(endless.url) as first:
        wait_for_bytes(first)
        with begun(endless.url):
            eventually(lambda: endless.app.pool.waiting == 1)  # type: ignore[union-attr]
            refused = ask(endless.url, CHAT, ENDLESS)
            assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
    eventually(lambda: not endless.app.active and busy_slots(endless) == 0)  # type: ignore[union-attr]


def test_a_client_that_takes_nothing_holds_no_slot(endless: dither.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told nothing more once it stalls, and what was made for it is dropped."""
    from dither.serving import relay

    monkeypatch.setattr(relay, "STALLED", 0.0)
    monkeypatch.setattr(relay, "MOST_KEPT", 2**16)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address(endless.url))
        connection.sendall(http(endless.url, CHAT, ENDLESS))
        wait_for_bytes(connection)
        eventually(lambda: not endless.app.active and busy_slots(endless) == 0, 60)  # type: ignore[union-attr]


def test_an_engine_that_dies_says_so_and_comes_back(endless: dither.Server) -> None:
    with begun(endless.url) as connection:
        wait_for_bytes(connection)
        os.kill(engine_of(endless)._process.pid, signal.SIGKILL)
        wait_for_bytes(connection, b'data: {"error": {"message": "the engine broke off')
    again = ask(endless.url, CHAT, {**ENDLESS, "max_tokens": 4}).events()
    assert again[-1]["choices"][0]["finish_reason"] == "length"


def test_while_a_model_loads_health_says_so(models: Path) -> None:
    """Who balances load looks there; who asks meanwhile waits and is answered."""
    with dither.serve(models / "thinker.gguf", context=256, slots=1, threads=1) as server:
        pool, load = server.app.pool, server.app.pool._load

        async def slow(model: Any, embeddings: bool) -> Any:
            await asyncio.sleep(1)
            return await load(model, embeddings)

        pool._load = slow
        os.kill(engine_of(server)._process.pid, signal.SIGKILL)
        eventually(lambda: not pool.models[0].ready)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        with connected(server.url, http(server.url, CHAT, body)) as asked:
            eventually(lambda: pool.models[0].loading is not None)
            told = ask(server.url, "/health")
            assert (told.status, told.json()["error"]["code"]) == (503, "loading") and "retry-after" in told.headers
            assert "thinker" in told.json()["error"]["message"]
            assert read_answer(asked).status == 200
        assert ask(server.url, "/health").json() == {"status": "ok", "loaded": ["thinker"]}


def test_models_take_turns_where_memory_is_for_one(models: Path) -> None:
    files = [models / "caller.gguf", models / "thinker.gguf"]
    probe = dither.serve(files, context=512, slots=1, threads=1, grammars=True)
    need = max(model.need for model in probe.models)
    probe.close()
    with dither.serve(files, context=512, slots=1, threads=1, memory=int(1.5 * need), grammars=True) as server:
        for model in ("thinker", "caller", "Thinker"):
            body = {"model": model, "messages": ENDLESS["messages"], "grammar": says("here")}
            assert ask(server.url, CHAT, body).json()["choices"][0]["message"]["content"] == "here"
            assert json.loads(ask(server.url, "/health").body)["loaded"] == [model.lower()]
        pids = [held.loads for held in server.app.pool.models if not held.embeddings]
        assert pids == [2, 2]


def test_what_cannot_be_served_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    caller = models / "caller.gguf"
    for options in (
        {"host": "0.0.0.0"},
        {"kv": "q9"},
        {"context": 0},
        {"slots": 0},
        {"queue": -1},
        {"port": 99999},
        {"engine": "magic"},
        {"memory": "1MB"},
        {"engine": "transformers"},
        {"api_keys": [""]},
    ):
        with pytest.raises(UsageError):
            dither.serve(caller, **options)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no such file"):
        dither.serve(caller, loras=[tmp_path / "none.gguf"], threads=1)
    (tmp_path / "caller.gguf").write_bytes(caller.read_bytes()[:-64])
    with pytest.raises(dither.DitherError):
        dither.serve(tmp_path / "caller.gguf")
    with pytest.raises(UsageError, match="two of the files"):
        dither.serve([caller, caller])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EngineError, match="listened"):
        dither.serve(caller, port=taken.getsockname()[1])


def test_two_files_of_one_name_are_told_apart_by_their_folders(models: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(models / "caller.gguf", tmp_path / folder / "model.gguf")
    files = [tmp_path / folder / "model.gguf" for folder in ("a", "b")]
    with dither.serve(files, context=256, slots=1, threads=1) as server:
        assert [model.name for model in server.models] == ["a/model", "b/model"]
        assert ask(server.url, "/v1/models/b/model").json()["id"] == "b/model"


def test_a_folder_of_one_gguf_is_that_file(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "caller.gguf", tmp_path / "inside.gguf")
    with dither.serve(tmp_path, context=256, slots=1, threads=1) as server:
        assert server.models[0].path == tmp_path / "inside.gguf"
        body = {"model": tmp_path.name, "messages": ENDLESS["messages"], "max_tokens": 1}
        assert ask(server.url, CHAT, body).status == 200


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_six_is_written_as_clients_want_it(models: Path, host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this system has no IPv6")
    with dither.serve(models / "caller.gguf", host=host, context=1, slots=1, threads=1) as server:
        assert server.url.startswith("http://[::1]:")
        assert ask(server.url, "/health", headers="Host: [::1]\r\n").status == 200


def test_a_quantized_cache_serves(models: Path, bundled: Path) -> None:
    with dither.serve(bundled, context=256, slots=2, kv="q8_0", threads=1) as server:
        body = {"messages": ENDLESS["messages"], "max_tokens": 8}
        assert ask(server.url, CHAT, body).json()["usage"]["completion_tokens"] == 8
        wide = server.models[0].memory
    with dither.serve(bundled, context=256, slots=2, threads=1) as server:
        assert wide and server.models[0].memory and wide.cache < server.models[0].memory.cache


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\nbeta\n")
    file.chmod(0o600)
    assert read_keys(file) == (["alpha", "beta"], None)
    file.chmod(0o644)
    assert "chmod 600" in (read_keys(file)[1] or "")
    for text in ("", "# only words\n", "kéy\n"):
        file.write_text(text)
        with pytest.raises(UsageError):
            read_keys(file)
    file.write_bytes(b"# from elsewhere\r\nalpha\r\n")
    assert read_keys(file)[0] == ["alpha"]
    file.write_text("#" + "x" * 2**16 + "\nalpha\n")  # a key cut off by a limit would be another key
    with pytest.raises(UsageError, match="longer than"):
        read_keys(file)
    with pytest.raises(dither.DitherError):
        read_keys(tmp_path / "none")


@contextlib.contextmanager
def served(*arguments: object, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    words = [*prefix, sys.executable, "-m", "dither", "serve", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe
            pipe.close()


def announced(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    lines = ""
    for line in process.stdout:
        lines += line
        if line == "}\n":
            return dict(json.loads(lines))
    raise AssertionError(f"it never listened: {process.stderr and process.stderr.read()}")


def test_sigterm_lets_answers_finish_and_refuses_new_ones(models: Path) -> None:
    """The command itself, as a service manager ends it: exit code 0, nothing cut off."""
    with served(models / "endless.gguf", "--port", 0, "-c", 2048, "--slots", 1, "--threads", 1, "--json") as process:
        document = announced(process)
        url = document["url"]
        assert document["models"][0]["memory_bytes"] > 0
        asked = {**ENDLESS, "max_tokens": 1000, "stream_options": {"include_usage": True}}
        with connected(url, http(url, CHAT, asked)) as running:
            peek = running.recv(1, socket.MSG_PEEK)
            assert peek
            process.send_signal(signal.SIGTERM)
            refused: list[Answer] = []
            eventually(lambda: bool(refused.append(ask(url, CHAT, ENDLESS)) or refused[-1].status == 503))
            assert refused[-1].json()["error"]["code"] == "shutting_down"
            assert "retry-after" in refused[-1].headers
            assert ask(url, "/health").status == 503
            events = read_answer(running).events()
        assert events[-1]["usage"]["completion_tokens"] == 1000
        assert process.wait(20) == 0


def test_without_a_network_everything_works(models: Path, tmp_path: Path) -> None:
    """A session in a network namespace where there is nothing but loopback: serve, chat, bench, export."""
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    probe = shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True, check=False)
    if not probe or probe.returncode:
        pytest.skip("this system lets nobody make a network namespace")
    script = (
        "import json, sys, urllib.request, dither\n"
        "from typer.testing import CliRunner\n"
        "from dither.cli import app\n"
        "with dither.serve(sys.argv[1], context=512, slots=1, threads=1) as server:\n"
        "    body = {'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 4, 'temperature': 0}\n"
        "    request = urllib.request.Request(server.url + '/chat/completions', json.dumps(body).encode())\n"
        "    answer = json.loads(urllib.request.urlopen(request).read())\n"
        "def run(*words):\n"
        "    result = CliRunner().invoke(app, [*words, '--json'])\n"
        "    assert result.exit_code == 0, result.output\n"
        "    return json.loads(result.stdout)\n"
        "chat = run('chat', sys.argv[1], '-p', 'hi', '-n', '4', '-t', '0', '--threads', '1')\n"
        "bench = run('bench', sys.argv[1], '-p', '4', '-n', '2', '-r', '1', '--threads', '1', '--no-save')\n"
        "export = run('export', sys.argv[1], '--lmstudio', sys.argv[2])\n"
        "speed = bench['decode_tokens_per_second']\n"
        "answers = [answer['choices'][0]['message']['content'], chat['answer']]\n"
        "print(json.dumps([*answers, speed > 0, list(export['files'])]))\n"
    )
    done = subprocess.run(
        [*alone, sys.executable, "-c", script, str(models / "endless.gguf"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == ["abca", "abca", True, ["endless.gguf"]]


def test_the_command_explains_a_refusal(models: Path) -> None:
    result = CliRunner().invoke(command, ["serve", str(models / "caller.gguf"), "--host", "0.0.0.0", "--json"])
    assert result.exit_code == 2 and "--insecure" in json.loads(result.stdout)["error"]["way_out"]
