"""The conversation and the tools of a chat request, held against OpenAI's rules.

BionicGPT sends every system text as an array of parts, echoes `reasoning_content`, and gives tool results
back as `role: tool`; all of it is passed on as it came, for the model's template to lay out.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    RootModel,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dither.serving.errors import UNSUPPORTED, wrong
from dither.serving.grammars import MOST_SCHEMA, check_schema

MOST_MESSAGES, MOST_TOOLS = 10_000, 256


class Checked(BaseModel):
    """Types as JSON has them: no text for a number, no number for a truth.  Unknown fields are left out."""

    model_config = ConfigDict(strict=True)


def _text_alone(kind: object) -> object:
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise wrong(f"is {kind[:40]!r}: models here read text alone", UNSUPPORTED)
    return kind


class Part(Checked):
    type: Annotated[Literal["text", "refusal"], BeforeValidator(_text_alone)]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refusals_are_text(cls, part: object) -> object:
        if isinstance(part, dict) and part.get("type") == "refusal":
            return {"type": "text", "text": part.get("refusal")}
        return part


class Parts(RootModel[Any]):
    root: Annotated[list[Part], FailFast()]


class Function(Checked):
    name: str
    arguments: str = "{}"


class Call(Checked):
    id: str = ""
    type: Annotated[Literal["function"], BeforeValidator(lambda _: "function")] = "function"
    function: Function


def _kind_of_content(value: object) -> str | None:
    return "<parts>" if isinstance(value, (list, Parts)) else "<text>" if isinstance(value, str) else None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<parts>")],
    Discriminator(
        _kind_of_content, custom_error_type="invalid_value", custom_error_message="must be a text or a list of parts"
    ),
]


class Message(Checked):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Content | None = Field(None, validate_default=True)
    tool_calls: Annotated[list[Call], FailFast(), Field(max_length=MOST_TOOLS)] = []
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = Field(None, validate_default=True)

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _by_the_assistant(cls, calls: object, info: ValidationInfo) -> object:
        return calls if calls and info.data.get("role") == "assistant" else []

    @field_validator("content", "tool_call_id")
    @classmethod
    def _needed(cls, value: object, info: ValidationInfo) -> object:
        needing = ("tool",) if info.field_name == "tool_call_id" else ("system", "user", "tool")
        if value is None and info.data.get("role") in needing:
            raise wrong("is needed in a message of this role")
        return value

    def passed_on(self) -> dict[str, Any]:
        left_out = None if self.tool_calls else {"tool_calls"}
        return {"role": self.role, "content": None, **self.model_dump(exclude_none=True, exclude=left_out)}


def check_size(schema: Any) -> None:
    if len(json.dumps(schema)) > MOST_SCHEMA:
        raise wrong(f"is longer than {MOST_SCHEMA} characters")


def _parameters(schema: Any) -> Any:
    if isinstance(schema, dict):
        check_schema(schema)
    return schema or {"type": "object", "properties": {}}


class Described(Checked):
    name: str = Field(min_length=1, max_length=256)
    description: Annotated[str, BeforeValidator(lambda text: str(text or ""))] = ""
    parameters: Annotated[dict[str, Any], BeforeValidator(_parameters)] = _parameters(None)


class Tool(Checked):
    type: Literal["function"] = "function"
    function: Described


class Tools(Checked):
    """What a chat offers, where it offers any."""

    tools: Annotated[list[Tool], FailFast(), Field(max_length=MOST_TOOLS)] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _short_enough(cls, tools: list[Tool]) -> list[Tool]:
        check_size([tool.model_dump() for tool in tools])
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _known(cls, choice: Any, info: ValidationInfo) -> Any:
        if choice in ("none", "auto", "required") or not info.data.get("tools"):
            return choice
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name not in [tool.function.name for tool in info.data["tools"]]:
            raise wrong('must be "none", "auto", "required" or name a tool of yours')
        return {"name": name}

    def offered(self) -> dict[str, Any]:
        """As llama.cpp takes it: "required" and one tool stand for a choice by name."""
        if not self.tools:
            return {}
        made = self.model_dump(include={"tools", "tool_choice", "parallel_tool_calls"}, exclude_none=True)
        if isinstance(self.tool_choice, dict):
            made["tools"] = [tool for tool in made["tools"] if tool["function"]["name"] == self.tool_choice["name"]]
            made["tool_choice"] = "required"
        return made
