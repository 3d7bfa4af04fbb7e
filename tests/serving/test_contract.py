"""What BionicGPT sends and expects, byte by byte, and what OpenAI's own client does.

Each test is a line of the contract: base URL ending in /v1, an empty bearer, system texts as arrays of
parts, tool messages, echoed thoughts, `choices` in every chunk, a usage chunk, [DONE], embeddings.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from serving_util import ask, http, says, speak

pytestmark = pytest.mark.slow  # real servers and engines: `make test` runs it, `make check` does not

BEARER = "Authorization: Bearer \r\n"  # with nothing after it: there is no key
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
HELLO = {"role": "user", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo"]}},
            "required": ["city"],
        },
    },
}
THOUGHT = "<think>\nHm, greetings.\n</think>\n\nGood day!"


def bionic(model: str, **more: Any) -> dict[str, Any]:
    """A request as BionicGPT's client makes it."""
    return {
        "model": model,
        "messages": [SYSTEM, HELLO],
        "stream": True,
        "stream_options": {"include_usage": True},
    } | more


def test_a_chat_streams_in_the_form_it_reads(url: str) -> None:
    answer = speak(
        url,
        http(
            url,
            "/v1/chat/completions",
            bionic("thinker", temperature=0.7, max_tokens=300, grammar=says("Good day!")),
            BEARER,
        ),
    )
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events()
    assert all(isinstance(event["choices"], list) for event in events)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Good day!"
    *chunks, usage = events
    assert [c["finish_reason"] for e in chunks for c in e["choices"] if c["finish_reason"]] == ["stop"]
    assert usage["choices"] == []
    counted = usage["usage"]
    assert counted["total_tokens"] == counted["prompt_tokens"] + counted["completion_tokens"]
    assert counted["prompt_tokens"] > 20 and counted["completion_tokens"] >= len("Good day!")
    assert {event["model"] for event in events} == {"thinker"}


def test_thoughts_come_apart_from_the_answer(url: str) -> None:
    answer = ask(url, "/v1/chat/completions", bionic("thinker", grammar=says(THOUGHT)), BEARER)
    deltas = [choice["delta"] for event in answer.events() for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas).strip() == "Hm, greetings."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Good day!"


def test_tool_calls_stream_with_index_id_and_function(url: str) -> None:
    answer = ask(url, "/v1/chat/completions", bionic("caller", tools=[WEATHER], temperature=0), BEARER)
    choices = [choice for event in answer.events() for choice in event["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert {call["index"] for call in calls} == {0}
    assert calls[0]["id"] and calls[0]["function"]["name"] == "weather"
    assert json.loads("".join(call["function"].get("arguments", "") for call in calls)) == {"city": "Oslo"}
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_whole_conversation_with_a_tool_goes_in_again(url: str) -> None:
    """Assistant content null, tool_calls, role tool, reasoning_content: all as the client echoes them."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        SYSTEM,
        HELLO,
        {"role": "assistant", "content": None, "reasoning_content": "A city.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "Thank you."}]},
    ]
    for model in ("caller", "thinker"):
        answer = ask(url, "/v1/chat/completions", bionic(model, messages=messages, max_tokens=3), BEARER)
        assert answer.status == 200 and answer.events()[-1]["usage"]["completion_tokens"] <= 3


def test_echoed_thoughts_reach_the_template(url: str) -> None:
    def prompt_tokens(thought: str) -> int:
        echoed = {"role": "assistant", "content": "Yes.", "reasoning_content": thought}
        body = {"model": "thinker", "messages": [HELLO, echoed, HELLO], "max_tokens": 1}
        return int(ask(url, "/v1/chat/completions", body).json()["usage"]["prompt_tokens"])

    assert prompt_tokens("x" * 50) - prompt_tokens("x" * 20) == 30  # a byte is a token here


def test_parts_read_as_their_text_does(url: str) -> None:
    def prompt_tokens(content: Any) -> int:
        body = {"model": "thinker", "messages": [{"role": "system", "content": content}], "max_tokens": 1}
        return int(ask(url, "/v1/chat/completions", body).json()["usage"]["prompt_tokens"])

    assert prompt_tokens([{"type": "text", "text": "Be brief."}]) == prompt_tokens("Be brief.")


def test_guard_models_ask_without_a_stream(url: str) -> None:
    body = {"model": "thinker", "messages": [SYSTEM, HELLO], "grammar": says("safe"), "max_tokens": 10}
    answer = ask(url, "/v1/chat/completions", body, BEARER)
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document["object"] == "chat.completion"
    assert document["choices"][0]["message"] == {"role": "assistant", "content": "safe"}
    assert document["usage"]["total_tokens"] == sum(
        document["usage"][kind] for kind in ("prompt_tokens", "completion_tokens")
    )


def test_errors_carry_texts_alone(url: str) -> None:
    answer = ask(url, "/v1/chat/completions", bionic("nobody"), BEARER)
    error = answer.json()["error"]
    assert answer.status == 404 and set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
    assert all(name in error["message"] for name in ("nobody", "thinker", "caller", "endless"))


def test_embeddings_with_usage(url: str) -> None:
    body = {"model": "caller", "input": ["the sea", "the letter"]}
    answer = ask(url, "/v1/embeddings", body, "Authorization: Bearer none\r\n").json()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    vectors = np.array([item["embedding"] for item in answer["data"]])
    assert vectors.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0


def test_without_a_key_ollamas_path_lies_under_the_base_url(url: str) -> None:
    texts = ["the sea", "the letter"]
    expected = ask(url, "/v1/embeddings", {"model": "caller", "input": texts}).json()["data"]
    for path in ("/v1/api/embed", "/api/embed"):
        found = ask(url, path, {"model": "caller", "input": texts}, BEARER).json()
        assert found["model"] == "caller" and found["prompt_eval_count"] > 0
        np.testing.assert_allclose(found["embeddings"], [item["embedding"] for item in expected], atol=1e-4)


def test_every_path_works_without_v1(url: str) -> None:
    body = {"model": "thinker", "messages": [HELLO], "max_tokens": 1}
    assert ask(url, "/chat/completions", body).status == 200
    assert ask(url, "/completions", {"model": "thinker", "prompt": "the", "max_tokens": 1}).status == 200
    assert ask(url, "/models").json() == ask(url, "/v1/models").json()


def test_openai_s_client_streams(client: Any) -> None:
    stream = client.chat.completions.create(
        model="Thinker",
        messages=[HELLO],
        stream=True,
        extra_body={"grammar": says(THOUGHT)},
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Good day!" and chunks[-1].usage.total_tokens > 0


def test_openai_s_client_calls_tools(client: Any) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    for wish in ("auto", "required", choice):
        made = client.chat.completions.create(
            model="caller", messages=[HELLO], tools=[WEATHER], tool_choice=wish, temperature=0
        )
        (call,) = made.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    none = client.chat.completions.create(
        model="caller", messages=[HELLO], tools=[WEATHER], tool_choice="none", temperature=0
    )
    assert none.choices[0].message.tool_calls is None


def test_openai_s_client_gets_its_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"const": "Oslo"}, "rain": {"type": "boolean"}},
        "required": ["city", "rain"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model="caller",
        messages=[HELLO],
        seed=7,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": schema}},
    )
    found = json.loads(made.choices[0].message.content)
    assert found["city"] == "Oslo" and isinstance(found["rain"], bool) and len(found) == 2


def test_openai_s_client_completes_and_stops(client: Any) -> None:
    made = client.completions.create(model="endless", prompt="\n", max_tokens=50, temperature=0, stop="c")
    assert made.choices[0].text == "ab" and made.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model="endless", prompt="\n", max_tokens=7, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == "abcabca"


def test_openai_s_client_reads_log_probabilities_of_completions(client: Any, server: Any) -> None:
    """Each against llama.cpp's own account of the same token, streaming or not."""
    asked: dict[str, Any] = {"model": "endless", "prompt": "ab", "max_tokens": 3, "temperature": 0}
    chosen = client.completions.create(**asked, logprobs=2).choices[0]
    found = chosen.logprobs
    assert "".join(found.tokens) == chosen.text and found.text_offset[0] == 0
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == value == max(top.values()) <= 0
    chunks = list(client.completions.create(**asked, logprobs=0, stream=True))
    lists = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [token for part in lists for token in part.tokens] == found.tokens
    assert [offset for part in lists for offset in part.text_offset] == found.text_offset == [0, 1, 2]
    assert all(top == {} for part in lists for top in part.top_logprobs)


def test_openai_s_client_embeds_as_floats_and_as_base64(client: Any) -> None:
    plain = client.embeddings.create(model="caller", input="the sea", encoding_format="float")
    packed = client.embeddings.with_raw_response.create(model="caller", input="the sea", encoding_format="base64")
    raw = json.loads(packed.content)["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(raw), "<f4")
    np.testing.assert_allclose(decoded, plain.data[0].embedding, atol=1e-6)


def test_openai_s_client_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["thinker", "caller", "endless"]
    assert client.models.retrieve("CALLER").id == "caller"


def test_a_seed_repeats_an_answer(client: Any) -> None:
    def answer(seed: int) -> str:
        made = client.chat.completions.create(
            model="thinker", messages=[HELLO], max_tokens=20, seed=seed, temperature=1.5
        )
        return str(made.choices[0].message.content) + str(made.choices[0].message.model_extra)

    assert answer(3) == answer(3)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_more_tokens_than_the_context_are_as_many_as_it_has(client: Any) -> None:
    made = client.chat.completions.create(
        model="endless", messages=[HELLO], max_tokens=10**15, temperature=0, timeout=60
    )
    assert made.choices[0].finish_reason == "length"
    assert made.usage.total_tokens == 1024
