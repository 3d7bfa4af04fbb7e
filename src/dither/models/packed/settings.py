"""What config.json says of a checkpoint's quantization, read with suspicion.

transformers keeps it as `quantization_config`; before it did, AutoGPTQ wrote quantize_config.json and
AutoAWQ quant_config.json beside; ModelOpt writes hf_quant_config.json.

Patterns in it are regular expressions of strangers: one such as (a+)+b takes longer than anybody waits, so
nested repeats are refused, and the number of choices and the length of names are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dither.errors import FormatError, UnsupportedError
from dither.models.contradictions import note
from dither.models.json_object import described
from dither.system.text import shown

WAY_OUT = "Take the model it was made from, in bf16."
MAX_PATTERN = 1000  # characters
MAX_NAME = 200  # of a module that patterns are held against
MAX_REPEATS = 5  # unbounded ones in a pattern
MAX_CHOICES = 8  # optional things and groups of alternatives
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_MODELOPT = "hf_quant_config.json"
_ALSO_CALLED = {
    "bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "sym": ("sym",), "desc_act": ("desc_act",),
    "zero_point": ("zero_point",), "version": ("version",), "quant_algo": ("quant_algo",),
}  # fmt: skip
_ESCAPED_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


@dataclass(frozen=True)
class Quantization:
    """One method's settings as they were found.  `thing` names the file in errors."""

    method: str
    config: Mapping[str, Any]
    thing: str
    notes: tuple[str, ...] = ()

    def text(self, *keys: str) -> str:
        """The first of these that is there, in lower case; "" where none is."""
        value = next((self.config[key] for key in keys if self.config.get(key) is not None), "")
        if not isinstance(value, str):
            raise FormatError(self.thing, f"{keys[0]} is {shown(repr(value))}, no text", WAY_OUT)
        return value.lower()

    def refuse(self, reason: str) -> UnsupportedError:
        return UnsupportedError(self.thing, f"is already quantized ({shown(self.method)}), {reason}", WAY_OUT)


def read_quantization(
    config: Mapping[str, Any], read_json: Callable[[str], Mapping[str, Any] | None], thing: str
) -> Quantization | None:
    """What the folder's files say; None where nothing speaks of quantization.

    `read_json` gives another file of the folder.  Raises FormatError where a description is none.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        if not isinstance(found, dict):
            raise FormatError(thing, "quantization_config is not an object", "Fetch config.json again.")
        method = str(found.get("quant_method") or "of an unnamed kind").lower()
        return Quantization(method, found, thing, tuple(_contradicted(method, found, read_json)))
    for name, method in _BESIDE.items():
        beside = read_json(name)
        if beside is not None:
            stated = str(beside.get("quant_method") or beside.get("method") or method).lower()
            if stated in _BESIDE.values():  # another's file may lie beside weights that it is not about
                return Quantization(stated, beside, thing.removesuffix("config.json") + name)
    beside = read_json(_MODELOPT)
    inner = beside.get("quantization") if beside is not None else None
    if isinstance(inner, dict) and inner.get("quant_algo"):
        return Quantization("modelopt", inner, thing.removesuffix("config.json") + _MODELOPT)
    return None


def _contradicted(
    method: str, found: Mapping[str, Any], read_json: Callable[[str], Mapping[str, Any] | None]
) -> Iterator[str]:
    """Notes on files beside config.json that tell of another quantization than it does."""
    for name in (*_BESIDE, _MODELOPT):
        beside = read_json(name)
        inner = (beside or {}).get("quantization") if name == _MODELOPT else beside
        if not isinstance(inner, Mapping):
            continue
        theirs = _told(inner, {_MODELOPT: "modelopt"}.get(name) or _BESIDE[name])
        ours = _told(found, method)
        differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
        if differing:
            said = [", ".join(f"{key} {described(told[key])}" for key in differing) for told in (theirs, ours)]
            yield note("quantization twice", file=name, theirs=said[0], ours=said[1])


def _told(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that two descriptions may share, under one name each."""
    found = {"method": str(config.get("quant_method") or config.get("method") or method).lower()}
    for key, names in _ALSO_CALLED.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found[key] = value
    return found


def whole(config: Mapping[str, Any], key: str, thing: str, default: int | None = None) -> int | None:
    """A whole number of a stranger's JSON.  Raises FormatError where it is something else, or immense."""
    value = config.get(key, default)
    if value is None:
        return default
    if type(value) is not int or not -1 <= value < 2**31:
        raise FormatError(thing, f"{key} is {value!r:.40}, no sensible number", WAY_OUT)
    return value


def flag(config: Mapping[str, Any], key: str, thing: str, default: bool) -> bool:
    value = config.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(thing, f"{key} is {value!r:.40}, neither true nor false", WAY_OUT)
    return value


def matches(pattern: str, name: str, thing: str) -> bool:
    """Whether a stranger's regular expression matches the beginning of a module's name.

    Raises FormatError where it is none, or could take forever.
    """
    if len(name) > MAX_NAME:
        raise FormatError(f"tensor {shown(name)}", "has too long a name to hold patterns against", WAY_OUT)
    return _compiled(pattern, thing).match(name) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str, thing: str) -> re.Pattern[str]:
    way_out = "Take the model from a source you trust."
    if len(pattern) > MAX_PATTERN or not _is_quick(pattern):
        raise FormatError(thing, f"has the pattern {shown(pattern)}, which could take forever", way_out)
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"has the pattern {shown(pattern)}, which is none ({error})"
        raise FormatError(thing, reason, way_out) from None


def _is_quick(pattern: str) -> bool:
    """Whether nothing that leaves a choice is repeated, and there are few of each.

    Then the time is at most a power of the name's length.

    >>> _is_quick(r"model\\.layers\\.[0-9]+\\.(gate|up)_proj.*"), _is_quick("(a+)+b"), _is_quick("(a|aa)*b")
    (True, False, False)
    """
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(", pattern):  # references back
        return False
    plain = _ESCAPED_OR_CLASS.sub("x", pattern).replace("(?", "(")
    repeats = choices = 0
    open_groups = [False]  # whether each leaves a choice
    closed = False  # whether the group that ends just before does
    for at, character in enumerate(plain):
        follows_repeat = at > 0 and plain[at - 1] in "*+?}"
        if character in "*+{" and not (character == "+" and follows_repeat):
            if closed:
                return False
            repeats += 1
            open_groups[-1] = True
        elif character == "|":
            choices += not open_groups[-1] and len(open_groups) > 1
            open_groups[-1] = True
        elif character == "?" and not follows_repeat:
            choices += 1
            open_groups[-1] = True
        elif character == "(":
            open_groups.append(False)
        elif character == ")" and len(open_groups) > 1:
            closed = open_groups.pop()
            open_groups[-1] |= closed
            continue
        closed = False
    return repeats <= MAX_REPEATS and choices <= MAX_CHOICES
