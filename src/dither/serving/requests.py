"""OpenAI's request bodies, checked before an engine sees them.

A field is one of four: checked and passed on; checked and answered for here; refused, because it asks for
what nobody here can do; or ignored, because it does not change the answer (`user`, `metadata`, `store`).
Beside OpenAI's own, the sampling fields that llama.cpp's users send are passed on.  What is none of these
never reaches the engine: llama.cpp's own interface has fields that other users should not feel.

Sources: OpenAI's API reference (chat, completions, embeddings); llama.cpp's `tools/server/README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dither.serving.errors import invalid, unsupported
from dither.serving.grammars import check_grammar, check_schema
from dither.serving.messages import check_messages, check_size, check_tools

MOST_DEPTH = 100  # of nested JSON; nobody's schema goes deeper
MOST_INPUTS = 2048  # texts to embed at once, OpenAI's own limit
_MOST_STOPS, _MOST_STOP = 16, 1000
_SEEDS = 2**31
# What a template is given anyway, and the arguments of transformers' `apply_chat_template`: a template of
# the client's own would be a program that it runs here.
_TEMPLATES_OWN = {
    "messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "conversation", "chat_template",
    "documents", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
}  # fmt: skip

Check: TypeAlias = Callable[[str, Any], Any]


def parse(raw: bytes) -> dict[str, Any]:
    """The body as JSON.  Raises ApiError where it is none, or no object, or nested beyond sense."""
    try:
        found = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    if _depth_exceeds(found, MOST_DEPTH):
        raise invalid(None, f"the body is nested more than {MOST_DEPTH} deep", "invalid_json")
    if _has_half_characters(found):
        raise invalid(None, "the body holds half a character: a surrogate without its other", "invalid_json")
    return {key: value for key, value in found.items() if value is not None}


def _has_half_characters(found: Any) -> bool:
    """Python reads what no engine and no UTF-8 has a place for."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a chat request goes to the engine."""
    _refuse(body, _NOT_IN_CHAT)
    made = _checked(body, _COMMON | _CHAT)
    made["messages"] = check_messages(body.get("messages"))
    if "tools" in body:
        made |= check_tools(body)
    if "response_format" in body:
        made["response_format"] = _response_format(body["response_format"])
    if "max_completion_tokens" in made:
        made["max_tokens"] = made.pop("max_completion_tokens")
    return made


def completions(body: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(body, _NOT_IN_COMPLETIONS)
    made = _checked(body, _COMMON | _COMPLETIONS)
    made["prompt"] = _prompt(body.get("prompt"))
    return made


def embeddings(body: Mapping[str, Any]) -> dict[str, Any]:
    if body.get("dimensions") is not None:
        raise unsupported("dimensions", "the vectors have the model's own length: leave `dimensions` out")
    made: dict[str, Any] = {"input": _inputs(body.get("input"))}
    form = body.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise invalid("encoding_format", 'encoding_format must be "float" or "base64"')
    return made | {"encoding_format": form}


def clamp(body: dict[str, Any], context: int) -> None:
    """More tokens than the context holds is as many as it holds; the answer then ends with "length"."""
    if "max_tokens" in body:
        body["max_tokens"] = min(body["max_tokens"], context)


def _checked(body: Mapping[str, Any], fields: Mapping[str, Check]) -> dict[str, Any]:
    return {name: check(name, body[name]) for name, check in fields.items() if name in body}


def _refuse(body: Mapping[str, Any], fields: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for name, (harmless, why) in fields.items():
        if name in body and not harmless(body[name]):
            raise unsupported(name, f"{name} is not supported: {why}")


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise invalid(name, f"{name} must be a number from {low:g} to {high:g}")
        return value

    return check


def whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            told = f"at least {low}" if high >= _SEEDS else f"from {low} to {high}"
            raise invalid(name, f"{name} must be a whole number, {told}")
        return value

    return check


def truth(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise invalid(name, f"{name} must be true or false")
    return value


def _seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(name, "seed must be a whole number")
    return value % _SEEDS  # llama.cpp has 32 bits for it, and takes the largest for a wish for chance


def _stop(name: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= _MOST_STOP for stop in stops):
        raise invalid(name, f"stop must be a text or a list of up to {_MOST_STOPS} texts, none empty")
    return list(stops)


def _bias(name: str, value: Any) -> dict[str, float]:
    good = isinstance(value, dict) and len(value) <= 1024
    if not good or not all(str(key).isdigit() for key in value):
        raise invalid(name, "logit_bias must map token ids to numbers from -100 to 100")
    check = number(-100, 100)
    return {key: check(name, bias) for key, bias in value.items()}


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise invalid(name, "stream_options must be an object")
    return {"include_usage": truth("stream_options.include_usage", value.get("include_usage") or False)}


def _template_arguments(name: str, value: Any) -> dict[str, Any]:
    """`enable_thinking` and the like; names of the template's own world would be overwritten."""
    if not isinstance(value, dict) or len(value) > 32:
        raise invalid(name, "chat_template_kwargs must be an object of a few arguments")
    taken = _TEMPLATES_OWN & value.keys()
    if taken:
        raise invalid(name, f"chat_template_kwargs may not set {', '.join(sorted(taken))}")
    return value


def _response_format(value: Any) -> dict[str, Any]:
    name = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(name, 'response_format.type must be "text", "json_object" or "json_schema"')
    if kind != "json_schema":
        return {"type": kind}
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f"{name}.json_schema", "response_format.json_schema.schema must be an object")
    check_size(f"{name}.json_schema", schema)
    check_schema(f"{name}.json_schema", schema)
    return {"type": kind, "json_schema": {"name": "answer", "schema": schema}}


def _prompt(value: Any) -> Any:
    """One text or one list of tokens.  OpenAI takes lists of them too, which are as many requests."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return value
    if isinstance(value, list) and value and all(isinstance(prompt, (str, list)) for prompt in value):
        raise unsupported("prompt", "several prompts in one request are not supported: send one request each")
    raise invalid("prompt", "prompt must be a text or a list of token ids, not empty")


def _inputs(value: Any) -> list[Any]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(type(token) is int for token in texts):
        texts = [texts]
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_INPUTS:
        raise invalid("input", f"input must be a text or a list of 1 to {MOST_INPUTS} texts")
    for text in texts:
        tokens = isinstance(text, list) and text and all(type(token) is int and token >= 0 for token in text)
        if not tokens and not (isinstance(text, str) and text):
            raise invalid("input", "each input must be a text or a list of token ids, not empty")
    return list(texts)


_COMMON: dict[str, Check] = {
    "stream": truth,
    "stream_options": _stream_options,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "max_tokens": whole(1, 2**63),
    "stop": _stop,
    "seed": _seed,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": _bias,
    # llama.cpp's own
    "top_k": whole(0, 10**6),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "repeat_penalty": number(0, 10),
    "repeat_last_n": whole(0, 10**6),
    "grammar": check_grammar,
}
_CHAT: dict[str, Check] = {
    "max_completion_tokens": whole(1, 2**63),
    "logprobs": truth,
    "top_logprobs": whole(0, 20),
    "chat_template_kwargs": _template_arguments,
}
_COMPLETIONS: dict[str, Check] = {"logprobs": whole(0, 5)}


def _one(value: Any) -> bool:
    return type(value) is int and value == 1


def _off(value: Any) -> bool:
    return value in (False, "", [], {}) or value is None


_NOT_IN_CHAT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_one, "ask once for each answer"),
    "functions": (_off, "they became `tools`"),
    "function_call": (_off, "it became `tool_choice`"),
    "audio": (_off, "the model writes text"),
    "modalities": (lambda value: value == ["text"], "the model writes text"),
    "prediction": (_off, "no engine here takes one"),
    "web_search_options": (_off, "the server reaches no network"),
}
_NOT_IN_COMPLETIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_one, "ask once for each answer"),
    "best_of": (_one, "ask once for each answer"),
    "echo": (_off, "the prompt is yours already"),
    "suffix": (_off, "no engine here fills in the middle"),
}
