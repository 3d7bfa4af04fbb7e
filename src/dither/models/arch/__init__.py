"""Families of models: how each one's Hugging Face checkpoint becomes a GGUF.

A family is found by iterating this folder: every module may define `FAMILIES`, a tuple of
`family.Family` tables.  Adding one is adding a file.

    family.py      what a family is: tables of names, changes, keys
    usual.py       the tables that most families share
    conversion.py  a table applied to a checkpoint
    shapes.py      the shapes that must come out of it
    changes.py     what happens to rows on the way, and back
    rope.py        rotary embedding and its scalings
"""

from __future__ import annotations

from functools import cache

from dither.errors import SourceError, UnsupportedError
from dither.models.arch.conversion import convert_with
from dither.models.arch.family import Config, Family, Feed
from dither.models.checkpoint import Checkpoint
from dither.models.json_object import JsonObject, described
from dither.system.discovery import modules, room_path
from dither.system.text import shown
from dither.types import Model

__path__ = room_path(__path__, __name__)
__all__ = ["convert", "families", "family_of", "feeds", "window_period"]


@cache
def families() -> tuple[Family, ...]:
    """Every family, by name."""
    found = [family for module in modules(__name__) for family in getattr(module, "FAMILIES", ())]
    return tuple(sorted(found, key=lambda family: family.name))


def family_of(config: Config) -> Family:
    """The family of a config.json, by its `architectures`, else by its `model_type`.

    Raises UnsupportedError naming what is known, SourceError where the two name different families.
    """
    listed = config.get("architectures")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    model_type = None if names else JsonObject(config, "config.json").text("model_type")
    for family in families():
        if set(names) & set(family.architectures) or (not names and model_type in family.model_types):
            _refuse_another(config, family)
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.architectures)})" for family in families())
    raise UnsupportedError(
        f"architecture {shown(', '.join(names) or model_type or 'not named in config.json')}",
        f"no family here has it; known are {known}",
        "A GGUF of any architecture can be quantized: convert it with llama.cpp's own tools first.",
    )


def _refuse_another(config: Config, family: Family) -> None:
    """Raises SourceError where `model_type`, by which transformers goes, names another family."""
    kind = config.get("model_type")
    other = next((each for each in families() if kind in each.model_types), family)
    if other is not family:
        reason = f"is {described(kind)} ({other.name}), but architectures names {family.name}"
        way_out = "transformers goes by the former, llama.cpp by the latter: write the right one into both."
        raise SourceError("config.json, model_type", reason, way_out)


def feeds(arch: str) -> tuple[Feed, ...]:
    """Which tensor's output each group of linear layers reads, for a GGUF architecture's name.

    Names of tensors that a particular model lacks may occur: experts in a dense Llama, say.
    Raises UnsupportedError for an architecture of no family.
    """
    readers: dict[str, dict[str, None]] = {}
    for family in families():
        for feed in family.feeds if family.arch == arch else ():
            readers.setdefault(feed.source, {}).update(dict.fromkeys(feed.readers))
    if not readers:
        known = ", ".join(sorted({family.arch for family in families()}))
        reason = f"no family here has it; known are {known}"
        raise UnsupportedError(f"architecture {arch}", reason, "Add a file to models/arch.")
    return tuple(Feed(source, tuple(names)) for source, names in readers.items())


def convert(checkpoint: Checkpoint, *, pre: str | None = None, readable: bool = True) -> Model:
    """A checkpoint as llama.cpp wants it: GGUF's names, order of rows and metadata, nothing read yet.

    `pre` names llama.cpp's pre-tokenizer where the tokenizer's own is not known.  Without `readable` no weight is
    looked at, and a tied model's second output matrix is taken for a copy.  The metadata lacks
    general.file_type and general.quantization_version, which the container adds.

    Raises UnsupportedError for a family, a tokenizer or a setting that is not known, SourceError for
    a checkpoint that contradicts itself, UsageError for a `pre` that llama.cpp does not have.
    """
    return convert_with(family_of(checkpoint.config), checkpoint, pre, readable=readable)


def window_period(arch: str) -> int | None:
    """Of layers with a sliding window every so many-th attends to everything: 1 where llama.cpp knows no window.

    None where no family here says.
    """
    periods = (1 if family.ignores_window else family.window_period for family in families() if family.arch == arch)
    return next(filter(None, periods), None)
