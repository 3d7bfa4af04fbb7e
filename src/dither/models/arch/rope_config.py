"""Rotary parameters out of every spelling that a config.json may have: what transformers computes with.

transformers 4 kept `rope_theta` and `rope_scaling` apart, transformers 5 has one `rope_parameters`, by kind of layer
where local and global layers differ.  Files have both, edited by hand and by tools, and the two may contradict each
other.  The order of precedence here is the one of transformers 5.23, odd corners included:

- `rope_scaling`, where it is not empty, replaces `rope_parameters` as a whole, its `rope_theta` too; for families with
  local layers it is laid over the global layers' parameters instead;
- `rope_type` goes before `type`, an inner `rope_theta` or `partial_rotary_factor` before one at the top;
- `original_max_position_embeddings` at the top goes before an inner one, and Phi-3 has a default for the top.

Where a spelling is read by one program and ignored by another (kinds of layer in a family that has none), it is
refused rather than guessed.

Source: transformers' `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`) and what
`configuration_phi3.py` and `configuration_gemma3.py` do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dither.errors import SourceError
from dither.models.arch.family import Family
from dither.models.contradictions import note
from dither.models.json_object import JsonObject, described

THETA, SHARE, ORIGINAL = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"
LOCAL_THETA = "rope_local_base_freq"
_NEWER, _OLDER = "rope_parameters", "rope_scaling"
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_NEED_ORIGINAL = ("llama3", "yarn", "longrope", "su")
_OTHERWISE_CALLED = ("su", "yarn")  # longrope's names in Phi-3's files
_CONFIG = "config.json"


@dataclass
class Rotary:
    """`shared` are the parameters of global layers (or of all), `local` those of local ones."""

    shared: dict[str, Any]
    local: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def settle(config: JsonObject, family: Family) -> Rotary:
    """One set of parameters, and a note on every contradiction.

    Raises SourceError for a spelling that readers disagree about, FormatError where a section is no object.
    """
    newer, older = config.section(_NEWER), config.section(_OLDER)
    settled = (_by_layer if LOCAL_THETA in family.defaults else _alike)(config, family, newer, older)
    shared, where = settled.shared, _OLDER if older else _NEWER
    if "rope_type" in shared and shared["rope_type"] is None:
        raise _unclear(f"{where}, rope_type", "is null", "Write the kind of scaling there, or default.")
    kind = shared.setdefault("rope_type", shared.get("type") or "default")
    if shared.get("type") not in (None, kind):
        said = {"type": described(shared["type"]), "rope_type": described(kind), "section": where}
        settled.notes.append(note("type beside rope_type", **said))
    _inner_first(settled, config, family, where)
    if kind in _NEED_ORIGINAL:
        _original(settled, config, family, where)
    if kind in _OTHERWISE_CALLED and family.scalings == ("longrope",):
        settled.notes.append(note("longrope called yarn", kind=kind))
        shared["rope_type"] = "longrope"
    return settled


def rewritten(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json with one spelling where several contradict each other, for a folder that every reader reads alike."""
    settled = settle(JsonObject(config, _CONFIG), family)
    if not settled.notes:
        return dict(config)
    kept = {key: value for key, value in config.items() if key not in (_OLDER, THETA, SHARE, LOCAL_THETA, ORIGINAL)}
    shared = {key: value for key, value in settled.shared.items() if key != "type"}
    if ORIGINAL in family.defaults:  # where transformers reads it at the top
        kept[ORIGINAL] = shared.get(ORIGINAL, config.get(ORIGINAL, family.defaults[ORIGINAL]))
    return {**kept, _NEWER: {_GLOBAL: shared, _LOCAL: settled.local} if settled.local else shared}


def _alike(config: JsonObject, family: Family, newer: JsonObject, older: JsonObject) -> Rotary:
    for where, section in ((_NEWER, newer), (_OLDER, older)):
        if isinstance(section.get(_GLOBAL), Mapping) or isinstance(section.get(_LOCAL), Mapping):
            reason = f"has parameters by kind of layer, which {family.name} has not: transformers ignores them, "
            raise _unclear(where, f"{reason}llama.cpp's converter does not", "Write them without kinds of layer.")
    settled = Rotary(dict(older or newer))
    if older and newer and _plain(older) != _plain(newer):
        theta = settled.shared.get(THETA) or config.get(THETA) or family.defaults.get(THETA)
        lost = f"; {THETA} {described(newer.get(THETA))} of {_NEWER} is lost, and {described(theta)} counts"
        lost = lost if newer.get(THETA) not in (None, theta) else ""
        taken = f"{_OLDER} alone is read ({_kind(older)})"
        settled.notes.append(note("rope_scaling beside rope_parameters", taken=taken, lost=lost))
    return settled


def _by_layer(config: JsonObject, family: Family, newer: JsonObject, older: JsonObject) -> Rotary:
    if newer and not isinstance(newer.get(_GLOBAL) or newer.get(_LOCAL), Mapping):
        reason = f"has no kinds of layer, which {family.name} has: transformers ignores it, llama.cpp's converter not"
        raise _unclear(_NEWER, reason, f"Write it as {_GLOBAL} and {_LOCAL}.")
    given = newer.section(_GLOBAL)
    shared = dict(given or {"rope_type": "default"})
    if older.get("type") is not None and "rope_type" not in older and older["type"] != shared.get("rope_type"):
        reason = f"has type {described(older['type'])} and no rope_type: transformers 5 ignores it for {family.name}"
        raise _unclear(_OLDER, reason, "Call it rope_type if the model was made with it, or leave it out.")
    shared |= older
    settled = Rotary(shared, dict(newer.section(_LOCAL)))
    if older and given and shared != dict(given):
        taken = f"{_OLDER} is laid over the global layers' ({_kind(shared)})"
        settled.notes.append(note("rope_scaling beside rope_parameters", taken=taken, lost=""))
    local = config.get(LOCAL_THETA)
    if local is not None and settled.local.get(THETA) not in (None, local):
        said = {"outer": described(local), "inner": described(settled.local[THETA]), "section": _LOCAL}
        settled.notes.append(note("rope_theta twice", **said))
    if settled.local.get(THETA) is None:
        settled.local[THETA] = family.defaults[LOCAL_THETA] if local is None else local
    return settled


def _inner_first(settled: Rotary, config: JsonObject, family: Family, where: str) -> None:
    for key in (THETA, SHARE):
        inner, outer = settled.shared.get(key), config.get(key)
        if inner is None:
            found = family.defaults.get(key) if outer is None else outer
            if found is not None:
                settled.shared[key] = found
        elif outer not in (None, inner):
            said = {"outer": described(outer), "inner": described(inner), "section": where}
            settled.notes.append(note(f"{key} twice", **said))


def _original(settled: Rotary, config: JsonObject, family: Family, where: str) -> None:
    inner, outer, default = settled.shared.get(ORIGINAL), config.get(ORIGINAL), family.defaults.get(ORIGINAL)
    if settled.local and outer not in (None, inner):
        reason = f"is at the top, where transformers does not look for {family.name}'s"
        raise _unclear(ORIGINAL, reason, f"Write it into {where}, {_GLOBAL}, or leave it out.")
    found, pair = outer, "original context twice"
    if outer is None and default is not None:
        found, pair = default, "original context, Phi-3"
    if found is not None:
        if inner not in (None, found):
            said = {"outer": described(found), "inner": described(inner), "section": where}
            settled.notes.append(note(pair, **said))
        settled.shared[ORIGINAL] = found
    elif inner is None:
        value = config.given("max_position_embeddings")
        kind = settled.shared["rope_type"]
        settled.notes.append(note("original context missing", kind=kind, value=described(value)))
        settled.shared[ORIGINAL] = value


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing, so that spellings of the same are the same."""
    kept = {key: value for key, value in section.items() if key not in ("type", "rope_type") and value is not None}
    return {**kept, "rope_type": section.get("rope_type") or section.get("type") or "default"}


def _kind(section: Mapping[str, Any]) -> str:
    factor = section.get("factor")
    kind = str(section.get("rope_type") or section.get("type") or "default")
    return described(kind).strip("'\"") + (f", factor {described(factor)}" if factor is not None else "")


def _unclear(key: str, reason: str, way_out: str) -> SourceError:
    return SourceError(f"{_CONFIG}, {key}", reason, way_out)
