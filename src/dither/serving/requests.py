"""OpenAI's request bodies, checked before an engine sees them.

A field is one of four: checked and passed on; checked and answered for here; refused, because it asks for
what nobody here can do; or ignored, because it does not change the answer (`user`, `metadata`, `store`).
Beside OpenAI's own, the sampling fields that llama.cpp's users send are passed on.  What is none of these
never reaches the engine: llama.cpp's own interface has fields that other users should not feel.

Sources: OpenAI's API reference (chat, completions, embeddings); llama.cpp's `tools/server/README.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, FailFast, Field, ValidationError

from dither.serving.errors import INVALID, UNSUPPORTED, ApiError, invalid, unsupported, wrong
from dither.serving.grammars import check_grammar, check_schema
from dither.serving.messages import MOST_MESSAGES, Checked, Message, Tools, check_size

MOST_DEPTH = 100  # of nested JSON; nobody's schema goes deeper
MOST_INPUTS = 2048  # texts to embed at once, OpenAI's own limit
_MOST_STOPS, _MOST_STOP = 16, 1000
# What a template is given anyway, and the arguments of transformers' `apply_chat_template`: a template of
# the client's own would be a program that it runs here.
_TEMPLATES_OWN = {
    "messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "conversation", "chat_template",
    "documents", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
}  # fmt: skip


def parse(raw: bytes) -> dict[str, Any]:
    """The body as JSON.  Raises ApiError where it is not JSON, not an object, or nested too deeply."""
    try:
        found = json.loads(raw, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode()  # Python reads half characters; no engine has a place for them
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from None
    except UnicodeEncodeError:
        raise invalid(None, "the body holds half a character: a surrogate without its other", "invalid_json") from None
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    if _depth_exceeds(found, MOST_DEPTH):
        raise invalid(None, f"the body is nested more than {MOST_DEPTH} deep", "invalid_json")
    return {key: value for key, value in found.items() if value is not None}


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


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= _MOST_STOP for stop in stops):
        raise wrong(f"must be a text or a list of up to {_MOST_STOPS} texts, none empty")
    return list(stops)


def _bias(value: dict[str, float]) -> dict[str, float]:
    if len(value) > 1024 or not all(token.isdigit() and -100 <= bias <= 100 for token, bias in value.items()):
        raise wrong("must map token ids to numbers from -100 to 100")
    return value


def _template_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """`enable_thinking` and the like; names of the template's own world would be overwritten."""
    taken = _TEMPLATES_OWN & value.keys()
    if taken or len(value) > 32:
        raise wrong(f"may not set {', '.join(sorted(taken))}" if taken else "must be an object of a few arguments")
    return value


def _prompt(value: Any) -> Any:
    """One text or one list of tokens.  OpenAI takes lists of them too, which are as many requests."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if _is_text(value):
        return value
    if isinstance(value, list) and value and all(isinstance(prompt, (str, list)) for prompt in value):
        raise wrong("is several, which one request may not hold: send one request each", UNSUPPORTED)
    raise wrong("must be a text or a list of token ids, not empty")


def _inputs(value: Any) -> list[Any]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(type(token) is int for token in texts):
        texts = [texts]
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_INPUTS:
        raise wrong(f"must be a text or a list of 1 to {MOST_INPUTS} texts")
    if not all(map(_is_text, texts)):
        raise wrong("must hold texts or lists of token ids, none empty")
    return list(texts)


def _is_text(value: Any) -> bool:
    """A text, or a list of token ids, not empty."""
    if isinstance(value, list):
        return bool(value) and all(type(token) is int and token >= 0 for token in value)
    return isinstance(value, str) and bool(value)


def _within(low: float, high: float) -> Any:
    return Field(None, ge=low, le=high)


class StreamOptions(Checked):
    include_usage: bool | None = None


class _Sampled(Checked):
    """What chats and completions have in common; `None` stands for what was not asked."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = _within(0, 2)
    top_p: float | None = _within(0, 1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[Any, AfterValidator(_stop)] = None
    # llama.cpp has 32 bits for a seed, and takes the largest for a wish for chance
    seed: Annotated[int, AfterValidator(lambda seed: seed % 2**31)] | None = None
    presence_penalty: float | None = _within(-2, 2)
    frequency_penalty: float | None = _within(-2, 2)
    logit_bias: Annotated[dict[str, float], AfterValidator(_bias)] | None = None
    # llama.cpp's own
    top_k: int | None = _within(0, 10**6)
    min_p: float | None = _within(0, 1)
    typical_p: float | None = _within(0, 1)
    repeat_penalty: float | None = _within(0, 10)
    repeat_last_n: int | None = _within(0, 10**6)
    grammar: Annotated[Any, AfterValidator(check_grammar)] = None


def _schema(described: dict[str, Any]) -> dict[str, Any]:
    schema = described.get("schema")
    if not isinstance(schema, dict):
        raise wrong("needs a schema, which must be an object")
    check_size(schema)
    check_schema(schema)
    return {"name": "answer", "schema": schema}


class _Form(Checked):
    type: Literal["text", "json_object"]


class _SchemaForm(Checked):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], AfterValidator(_schema)]


class Chat(_Sampled, Tools):
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = _within(0, 20)
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_arguments)] | None = None
    response_format: _Form | _SchemaForm | None = Field(None, discriminator="type")


class Completion(_Sampled):
    prompt: Annotated[Any, AfterValidator(_prompt)]
    logprobs: int | None = _within(0, 5)


class Embedding(Checked):
    input: Annotated[Any, AfterValidator(_inputs)]
    encoding_format: Literal["float", "base64"] = "float"


# what nobody here can do, the values that do not ask for it, and why
Refused = dict[str, tuple[tuple[Any, ...], str]]
_OFF: tuple[Any, ...] = (False, "", [], {})
_NOT_IN_CHAT: Refused = {
    "n": ((1,), "ask once for each answer"),
    "functions": (_OFF, "they became `tools`"),
    "function_call": (_OFF, "it became `tool_choice`"),
    "audio": (_OFF, "the model writes text"),
    "modalities": ((["text"],), "the model writes text"),
    "prediction": (_OFF, "no engine here takes one"),
    "web_search_options": (_OFF, "the server reaches no network"),
}
_NOT_IN_COMPLETIONS: Refused = {
    "n": ((1,), "ask once for each answer"),
    "best_of": ((1,), "ask once for each answer"),
    "echo": (_OFF, "the prompt is yours already"),
    "suffix": (_OFF, "no engine here fills in the middle"),
}
_NOT_IN_EMBEDDINGS: Refused = {"dimensions": ((), "the vectors have the model's own length")}


def chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a chat request goes to the engine."""
    found = _checked(Chat, body, _NOT_IN_CHAT)
    made = found.model_dump(exclude_unset=True, exclude={*Tools.model_fields, "messages"})
    made["messages"] = [message.passed_on() for message in found.messages]
    made |= found.offered()
    if "max_completion_tokens" in made:
        made["max_tokens"] = made.pop("max_completion_tokens")
    return made


def completions(body: Mapping[str, Any]) -> dict[str, Any]:
    return _checked(Completion, body, _NOT_IN_COMPLETIONS).model_dump(exclude_unset=True)


def embeddings(body: Mapping[str, Any]) -> dict[str, Any]:
    return _checked(Embedding, body, _NOT_IN_EMBEDDINGS).model_dump()


Body = TypeVar("Body", bound=BaseModel)
# pydantic's words for what is wrong, where ours are plainer
_REASONS = {
    "missing": "is needed",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must have one of the types {expected_tags}",
    "union_tag_not_found": "must have a type",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
}


def _checked(kind: type[Body], body: Mapping[str, Any], refused: Refused) -> Body:
    """The body as `kind`.  Raises ApiError with the first thing that is wrong with it."""
    for name, (harmless, why) in refused.items():
        if body.get(name) not in (None, *harmless):
            raise unsupported(name, f"{name} is not supported: {why}")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path(first["loc"])
        known = _REASONS.get(first["type"])
        reason = known.format(**first.get("ctx", {})) if known else re.sub(r"^\w+ should ", "must ", first["msg"])
        code = UNSUPPORTED if first["type"] == UNSUPPORTED else "invalid_value"
        raise ApiError(400, f"{param} {reason}", INVALID, code, param) from None


def _path(place: tuple[int | str, ...]) -> str:
    """messages[0].content, say.  Tags of a union are left out, and so are the keys of a table."""
    names = [name for name, _ in groupby(place) if not str(name).startswith("<")]  # a type's name follows its field's
    names = names[:1] if names[0] == "logit_bias" else names
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
