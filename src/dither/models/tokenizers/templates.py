"""Chat templates: Jinja text that turns messages into a prompt, carried over word for word.

transformers 5 keeps the default in chat_template.jinja and others in additional_chat_templates/; older
versions wrote one string, or a list of named ones, into tokenizer_config.json, and chat_template.json for models
that also see.  The first that is there wins, as it does in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dither.errors import SourceError
from dither.formats.ggml import Field, ValueType, array, string
from dither.models.contradictions import note
from dither.system.json_text import parse_object

MAX_TEMPLATE = 2**22  # bytes; the largest known has some 30 thousand
KEY = "tokenizer.chat_template"
DEFAULT = "default"
FILE, CONFIG, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def read_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Templates by name, the one for plain chat being "default", and notes where files contradict each other."""
    stored = config.get("chat_template")
    listed = [{"name": "default", "template": stored}] if isinstance(stored, str) else stored
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    named = ((entry.get("name"), entry.get("template")) for entry in entries)
    in_config = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    files = {"default": folder / FILE}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    in_files = {name: _text(path) for name, path in files.items() if path.is_file()}
    in_old = _of_processor(folder / OLD_FILE)
    found = {FILE: in_files.get(DEFAULT), CONFIG: in_config.get(DEFAULT), OLD_FILE: in_old}
    return {**({DEFAULT: in_old} if in_old else {}), **in_config, **in_files}, _told(found)


def _told(found: Mapping[str, str | None]) -> list[str]:
    """A note where the first file that has a default template is not the only one, and another says otherwise."""
    there = {name: text for name, text in found.items() if text is not None}
    chosen = next(iter(there), "")
    others = [name for name, text in there.items() if text.strip() != there[chosen].strip()]
    return [note("chat templates", others=" and ".join(others), chosen=chosen)] if others else []


def _of_processor(path: Path) -> str | None:
    """The template that transformers 4 wrote for models that also see: the last resort."""
    if not path.is_file():
        return None
    found = parse_object(_text(path).encode(), str(path), "Fetch the file again.", finite=False, unique=True)
    text = found.get("chat_template")
    return text if isinstance(text, str) else None


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
