"""Chat templates: Jinja text that turns messages into a prompt, carried over word for word.

transformers 5 keeps the default in chat_template.jinja and others in additional_chat_templates/; older
versions wrote one string, or a list of named ones, into tokenizer_config.json.  A file wins over the
config, as it does in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import SourceError
from dither.formats.ggml import Field, ValueType, array, string

MAX_TEMPLATE = 2**22  # bytes; the largest known has some 30 thousand
KEY = "tokenizer.chat_template"


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, the one for plain chat being "default"."""
    stored = config.get("chat_template")
    listed = [{"name": "default", "template": stored}] if isinstance(stored, str) else stored
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    named = ((entry.get("name"), entry.get("template")) for entry in entries)
    found = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return found | {name: _text(path) for name, path in files.items() if path.is_file()}


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEMPLATE:
        raise SourceError(str(path), f"is larger than {MAX_TEMPLATE} bytes", "Check that it is a chat template.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(str(path), f"is not UTF-8 ({error.reason})", "Fetch the file again.") from None


def template_fields(templates: Mapping[str, str]) -> dict[str, Field]:
    """GGUF's keys: the default under its own, the others by name with a list of the names."""
    found = {KEY: string(templates["default"])} if "default" in templates else {}
    named = {name: text for name, text in templates.items() if name != "default"}
    if named:
        found[f"{KEY}s"] = array(ValueType.STRING, sorted(named))
        found |= {f"{KEY}.{name}": string(text) for name, text in sorted(named.items())}
    return found
