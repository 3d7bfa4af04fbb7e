"""The conversation and the tools of a chat request, held against OpenAI's rules.

BionicGPT sends every system text as an array of parts, echoes `reasoning_content`, and gives tool results
back as `role: tool`; all of it is passed on as it came, for the model's template to lay out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dither.serving.errors import ApiError, invalid, unsupported
from dither.serving.grammars import MOST_SCHEMA, check_schema

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES, MOST_TOOLS = 10_000, 256
_MOST_NAME = 256


def check_messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise invalid("messages", "messages must be a list with at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(at: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(at, f"{at} must be an object")
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{at}.role", f"{at}.role must be one of {', '.join(ROLES)}")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    made["content"] = _content(f"{at}.content", message.get("content"), optional=role == "assistant")
    if role == "assistant" and calls:
        made["tool_calls"] = _calls(f"{at}.tool_calls", calls)
    for name in ("reasoning_content", "name", "tool_call_id"):
        if message.get(name) is not None:
            made[name] = _text(f"{at}.{name}", message[name])
    if role == "tool" and "tool_call_id" not in made:
        raise invalid(f"{at}.tool_call_id", f"{at} answers no call: it needs a tool_call_id")
    return made


def _content(at: str, value: Any, optional: bool) -> Any:
    if value is None and optional:
        return None
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(at, f"{at} must be a text or a list of parts")
    return [_part(f"{at}[{i}]", part) for i, part in enumerate(value)]


def _part(at: str, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal"):
        return {"type": "text", "text": _text(f"{at}.{kind}", part.get(kind))}
    if isinstance(kind, str):
        raise unsupported(f"{at}.type", f"{at} is of the type {kind[:40]!r}: models here read text alone")
    raise invalid(at, f'{at} must be a part such as {{"type": "text", "text": "…"}}')


def _text(at: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(at, f"{at} must be a text")
    return value


def _calls(at: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise invalid(at, f"{at} must be a list of calls")
    made = []
    for i, call in enumerate(value):
        here = f"{at}[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise invalid(here, f"{here}.function must be an object with name and arguments")
        name = _text(f"{here}.function.name", function.get("name"))
        arguments = _text(f"{here}.function.arguments", function.get("arguments", "{}"))
        made.append(
            {
                "id": _text(f"{here}.id", call.get("id", "")),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return made


def check_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """tools, tool_choice and parallel_tool_calls; nothing where no tool is offered."""
    tools = body["tools"]
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise invalid("tools", f"tools must be a list of at most {MOST_TOOLS} tools")
    if not tools:
        return {}
    made: dict[str, Any] = {"tools": [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools)]}
    check_size("tools", made["tools"])
    names = {tool["function"]["name"] for tool in made["tools"]}
    made["tool_choice"], only = _choice(body.get("tool_choice", "auto"), names)
    if only is not None:
        made["tools"] = [tool for tool in made["tools"] if tool["function"]["name"] == only]
    parallel = body.get("parallel_tool_calls")
    if parallel is not None:
        if not isinstance(parallel, bool):
            raise invalid("parallel_tool_calls", "parallel_tool_calls must be true or false")
        made["parallel_tool_calls"] = parallel
    return made


def _tool(at: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise invalid(f"{at}.type", f'{at}.type must be "function"')
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME:
        raise invalid(f"{at}.function", f"{at}.function needs a name")
    made: dict[str, Any] = {"name": name, "description": str(function.get("description") or "")}
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise invalid(f"{at}.function.parameters", f"{at}.function.parameters must be a JSON schema")
    check_schema(f"{at}.function.parameters", parameters)
    return {"type": "function", "function": made | {"parameters": parameters}}


def check_size(at: str, schema: Any) -> None:
    if len(json.dumps(schema)) > MOST_SCHEMA:
        raise invalid(at, f"{at} is longer than {MOST_SCHEMA} characters")


def _choice(value: Any, names: set[str]) -> tuple[str, str | None]:
    """llama.cpp's word for it, and the one tool that is meant; it knows no choice by name."""
    if value in ("none", "auto", "required"):
        return value, None
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise invalid("tool_choice", 'tool_choice must be "none", "auto", "required" or name a tool of yours')
    return "required", name


def no_place_for_tools(model: str) -> ApiError:
    return unsupported(
        "tools",
        f"the chat template of {model} has no place for tools: send the request without, or serve a model "
        "that was trained to call them",
    )
