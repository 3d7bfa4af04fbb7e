"""Folders served by transformers: the same answers as its own `generate`, in OpenAI's form."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from serving_util import ask, connected, http

import dither

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # loads torch and a model

PROMPT = "The old man looked at the sea and"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(str(files("dither") / "demo_model"), tmp_path_factory.mktemp("folder") / "demo"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[dither.Server]:
    with dither.serve(folder, context=256, queue=4, threads=1) as server:
        yield server


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Greedy continuations by transformers alone: (text, tokens)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def test_a_completion_is_generate_s(served: dither.Server, reference: Any) -> None:
    expected = reference(PROMPT, 20)
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    made = ask(served.url, "/v1/completions", body).json()
    assert made["choices"][0]["text"] == expected and made["choices"][0]["finish_reason"] == "length"
    assert made["usage"]["completion_tokens"] == 20 and made["object"] == "text_completion"
    events = ask(served.url, "/v1/completions", body | {"stream": True}).events()
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == expected


def test_a_chat_streams_with_usage(served: dither.Server) -> None:
    body = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Hello"},
        ],
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 3,
    }
    first, second = (ask(served.url, "/v1/chat/completions", body).events() for _ in range(2))

    def text(events: list[Any]) -> str:
        return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])

    assert text(first) == text(second) != ""
    assert first[-1]["choices"] == [] and first[-1]["usage"]["total_tokens"] > 8
    assert first[0]["choices"][0]["delta"]["role"] == "assistant"


def test_it_stops_at_a_text_even_inside_tokens(served: dither.Server, reference: Any) -> None:
    whole = reference(PROMPT, 20)
    stop = whole[7:10]
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stop": [stop]}
    made = ask(served.url, "/v1/completions", body).json()["choices"][0]
    assert made["text"] == whole[: whole.index(stop)] and made["finish_reason"] == "stop"


def test_what_it_cannot_do_is_said(served: dither.Server) -> None:
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    for more, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ):
        answer = ask(served.url, "/v1/chat/completions", hello | more)
        assert answer.status == 400 and answer.json()["error"]["param"] == param
    for name, value, nothing in (
        ("presence_penalty", 1, 0),
        ("frequency_penalty", 0.5, 0.0),
        ("logit_bias", {"5": 9}, {}),
        ("typical_p", 0.5, 1),
        ("logprobs", True, False),
    ):
        answer = ask(served.url, "/v1/chat/completions", hello | {name: value})
        assert answer.status == 400 and name in answer.json()["error"]["message"]
        assert ask(served.url, "/v1/chat/completions", hello | {name: nothing, "max_tokens": 1}).status == 200
    unknown = ask(served.url, "/v1/completions", {"prompt": [10**6]})
    assert unknown.status == 400 and "vocabulary" in unknown.json()["error"]["message"]
    assert ask(served.url, "/v1/embeddings", {"input": "x"}).status == 400
    long = ask(served.url, "/v1/completions", {"prompt": "sea " * 500})
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_extremes_of_sampling_are_answered(served: dither.Server, reference: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5}
    for more in ({"temperature": 1e-300}, {"top_p": 1e-300}, {"temperature": 0, "repeat_penalty": 1}):
        made = ask(served.url, "/v1/completions", body | more).json()
        assert made["choices"][0]["text"] == reference(PROMPT, 5)
    assert ask(served.url, "/v1/completions", body | {"repeat_penalty": 1e-300}).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_kernel_raises_is_told_and_the_model_loaded_anew(served: dither.Server, reference: Any) -> None:
    """A kernel's own assertion, say; a request that never hears of it would wait forever."""

    def fails(**_: Any) -> None:
        raise AssertionError("of some kernel")

    engine: Any = served.app.pool.models[0].engine
    engine._model.generate = fails
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    answer = ask(served.url, "/v1/completions", body)
    assert answer.status == 502 and answer.json()["error"]["code"] == "engine"
    assert ask(served.url, "/v1/completions", body).json()["choices"][0]["text"] == reference(PROMPT, 5)


def test_a_client_that_leaves_ends_the_work(served: dither.Server) -> None:
    body = {"prompt": PROMPT, "stream": True}
    with connected(served.url, http(served.url, "/v1/completions", body)) as connection:
        assert connection.recv(100)
    end = time.monotonic() + 20
    while served.app.active or served.app.pool.running:
        assert time.monotonic() < end
        time.sleep(0.02)
    again = ask(served.url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).json()
    assert again["usage"]["completion_tokens"] <= 2


def test_a_quantized_folder_is_served(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers reads this format with compressed-tensors")
    dither.quantize(folder, "w8a16", tmp_path / "w8")
    with dither.serve(tmp_path / "w8", context=256, threads=1) as server:
        made = ask(server.url, "/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}).json()
        assert made["usage"]["completion_tokens"] == 12
        assert json.dumps(made["choices"][0]["text"])


HOSTILE = [
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ lipsum.__globals__['os'].system('touch OWNED') }}",
    "{{ self.__init__.__globals__.__builtins__.open('OWNED', 'w') }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ raise_exception.__globals__.os.system('touch OWNED') }}",
    "{{ (strftime_now|attr('__globals__'))['os'].system('touch OWNED') }}",
    "{{ ''['format'].__globals__ }}{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% include 'config.json' %}",
    "{% import '/etc/passwd' as x %}{{ x }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_runs_nothing(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template is a program by strangers: in the sandbox it reaches no function of Python's, and no file."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from dither.engines.protocol import CHAT
    from dither.engines.transformers import TransformersEngine, template_faults

    monkeypatch.chdir(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = template.replace("OWNED", str(tmp_path / "owned"))
    said: list[str] = []
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda *texts, **_: said.append(texts[1]) or {"input_ids": []}
    )
    try:
        TransformersEngine(None, tokenizer, 64).tokens(CHAT, {"messages": [{"role": "user", "content": "x"}]})
    except template_faults() as error:
        said.append(str(error))
    assert not (tmp_path / "owned").exists()
    assert "root:" not in "".join(said) and "<class" not in "".join(said)


DEEP = [
    "{" * 1000,
    "{{ " + "(" * 500,
    "{% if x %}" * 300 + "{% endif %}" * 300,
    "{{ 1" + "+1" * 20_000 + " }}",
    "{{ x.y.z }}",
]


@pytest.mark.parametrize("template", DEEP, ids=range(len(DEEP)))
def test_a_template_that_cannot_be_compiled_is_refused(template: str) -> None:
    """Found by fuzzing: a RecursionError of the compiler was nobody's, and the client was hung up on."""
    import asyncio

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from dither.engines.protocol import CHAT
    from dither.engines.transformers import TransformersEngine

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = template

    async def asked() -> tuple[int, Any]:
        reply = await TransformersEngine(object(), tokenizer, 64).ask(CHAT, {"messages": []})
        return reply.status, json.loads(b"".join([piece async for piece in reply.pieces]))

    status, document = asyncio.run(asked())
    assert status == 400 and document["error"]["message"].startswith("the chat template refuses this")
