"""plan.toml: a plan as a person reads and edits it.

One line per tensor says its type, and what that was predicted to cost.  Types may be edited by hand: reading
recomputes nothing, and the plan's hash covers what decides the quantized file (types, solver, transforms),
not what was only predicted, nor comments and order.

Python reads TOML and does not write it.  Writing is simple where every string is a basic string: quotes,
backslashes and control characters are escaped, and all else stands as it is (TOML 1.0, section "String").
The file may come from anywhere, so reading bounds its size, and refuses what it does not know.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError

from dither.codecs import codec
from dither.containers.mix import exactly
from dither.containers.presets import quantized_types
from dither.errors import OutputError, UsageError
from dither.system.files import replace as replace_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FORMAT = 2
_BEFORE = 1  # its `bytes` were those of the tensors alone, and its `budget` was of whichever had been asked for
_ANY_COLUMNS = 4096  # of a matrix whose type is only to be named
_MOST_BYTES = 4 * 2**20  # of a plan file; a line per tensor of the largest models takes a tenth of it
_MOST = 2**63 - 1
_NO_OTHER_KEYS = ConfigDict(extra="forbid")
_STRING_OR_COMMENT = re.compile(r"""(\"{3}|'{3})|"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?|\#[^\n]*""")
_DEEP = re.compile(r"(?:\.[^.\n]*){9}")
_MUST_BE = {
    ("kl", "float_type"): "a number",
    ("kl", ""): "a finite number of at least 0",
    ("bytes", ""): "a whole number from 0 to 2⁶³ − 1",
    ("tensor_bytes", ""): "a whole number from 0 to 2⁶³ − 1",
    ("budget", ""): "a whole number from 0 to 2⁶³ − 1",
    ("tensors", ""): "a table",
    ("transforms", ""): "a list of strings",
    ("notes", ""): "a list of strings",
}
_HEADER = """\
# A plan of Dither: which type every tensor becomes.
#
# To change one, write another type between the quotes, such as Q4_K, Q6_K or Q8_0.  Nothing else needs to
# change: `bytes` (of the file; of a tensor, where it stands beside one), `tensor_bytes` (of all tensors) and `kl`
# (predicted KL divergence, nats per token) say what was planned and decide nothing.
# Lines of tensors may stand in any order; one that is taken out gets the type of the mix it is used with.
"""


# Exactly these types: without Strict pydantic takes `true` for 1, and the text "1" as well.
_Text = Annotated[str, Strict()]
_Bytes = Annotated[int, Strict(), Field(ge=0, le=_MOST)]
_Kl = Annotated[float, Strict(), Field(ge=0, le=_MOST, allow_inf_nan=False)]


@dataclass(frozen=True)
class PlanEntry:
    __pydantic_config__ = _NO_OTHER_KEYS

    type: _Text
    bytes: _Bytes
    kl: _Kl | None = None  # predicted, nats per token


@dataclass(frozen=True)
class PlanFile:
    """A plan.  `tensors` holds, in the file's order, the matrices whose type it decides."""

    __pydantic_config__ = _NO_OTHER_KEYS

    model: _Text
    model_identity: _Text
    evidence: _Text  # sha256 of what the prediction came from, or ""
    solver: _Text
    transforms: tuple[_Text, ...]
    budget: _Bytes | None  # of the file; None where only the divergence was limited
    tensor_bytes: _Bytes
    kl: _Kl | None
    tensors: Mapping[str, PlanEntry]
    notes: tuple[_Text, ...]
    container: _Text = ""  # a GPU format's name; "" for GGUF
    bytes: _Bytes | None = None  # of the file, or of a folder's files together, where that was planned

    def overrides(self) -> tuple[tuple[str, str], ...]:
        """(regular expression that only this name matches, type), for `containers.mix.Options`."""
        return tuple((exactly(name), entry.type) for name, entry in self.tensors.items())


def plan_sha256(plan: PlanFile) -> str:
    """Over what decides the quantized file: tensor → type, the solver, the transforms in their order."""
    decides = {
        "tensors": {name: planned.type for name, planned in plan.tensors.items()},
        "solver": plan.solver,
        "transforms": list(plan.transforms),
        **({"container": plan.container} if plan.container else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def write_plan(path: str | Path, plan: PlanFile, *, force: bool = False) -> None:
    """Writes it under a temporary name, syncs, renames.

    Raises OutputError where that fails or, without `force`, where something stands there already; UsageError
    for a plan that could not be read back.
    """
    target = Path(path)
    text = _dump(plan)
    _parse(text, str(target))  # what is written can be read back
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise OutputError(str(target), "is no regular file", "Choose another name with -o.")
    if target.exists() and not force:
        raise OutputError(str(target), "exists already", "Choose another name with -o, or pass --force.")
    replace_file(target, text.encode(), "Choose another place with -o.")


def read_plan(path: str | Path) -> PlanFile:
    """A plan from a file.  Raises UsageError: missing, no TOML, unknown key or type, value out of range."""
    source = Path(path)
    try:
        if not source.is_file():
            raise UsageError(str(source), "is no file", "`dither plan MODEL -o plan.toml` writes one.")
        with source.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UsageError(str(source), f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(str(source), "is no text in UTF-8", "A plan is a TOML file.") from None
    return _parse(text, str(source))


def _dump(plan: PlanFile) -> str:
    values = {
        "format": str(_FORMAT),
        "container": _quoted(plan.container) if plan.container else "",
        "model": _quoted(plan.model),
        "model_identity": _quoted(plan.model_identity),
        "evidence": _quoted(plan.evidence),
        "solver": _quoted(plan.solver),
        "transforms": f"[{', '.join(map(_quoted, plan.transforms))}]",
        "budget": "" if plan.budget is None else str(plan.budget),
        "bytes": "" if plan.bytes is None else str(plan.bytes),
        "tensor_bytes": str(plan.tensor_bytes),
        "kl": "" if plan.kl is None else repr(float(plan.kl)),
        "notes": "[" + "".join(f"\n    {_quoted(note)}," for note in plan.notes) + "\n]",
    }
    lines = [f"{key} = {value}" for key, value in values.items() if value]
    return "\n".join([_HEADER, *lines, "", "[tensors]", *_tensor_lines(plan.tensors), ""])


def _tensor_lines(tensors: Mapping[str, PlanEntry]) -> list[str]:
    """One per tensor, its parts below each other."""
    kl = {name: "" if entry.kl is None else f", kl = {float(entry.kl)!r}" for name, entry in tensors.items()}
    rows = [(_quoted(name), _quoted(t.type) + ",", str(t.bytes), kl[name]) for name, t in tensors.items()]
    names, types, digits = (max((len(row[at]) for row in rows), default=0) for at in range(3))
    return [
        f"{name:<{names}} = {{ type = {kind:<{types}} bytes = {size:>{digits}}{kl} }}" for name, kind, size, kl in rows
    ]


def _quoted(text: str) -> str:
    """A TOML basic string, which is also how a name from anywhere is shown on a terminal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda sign: f"\\u{ord(sign[0]):04x}", escaped) + '"'


def _parse(text: str, thing: str) -> PlanFile:
    try:
        if len(text.encode()) > _MOST_BYTES:
            raise UsageError(thing, f"is larger than a plan may be ({_MOST_BYTES} bytes)", "Plan again.")
        _refuse_depth(text)
        document = tomllib.loads(text)
    except RecursionError:
        raise UsageError(thing, "is nested too deeply", "Plan again.") from None
    except ValueError as error:  # of TOML, of numbers too long, of characters that UTF-8 has not
        raise UsageError(thing, f"is no plan: {error}", "Mend that place, or plan again.") from None
    version = document.pop("format", None)
    if type(version) is not int:
        raise UsageError(thing, "has no `format` that is a whole number", "Mend it, or plan again.")
    if version not in (_BEFORE, _FORMAT):
        reason = f"has format {version}, and this Dither reads {_BEFORE} and {_FORMAT}"
        raise UsageError(thing, reason, "Plan again, or upgrade with: pip install -U dither")
    if version == _BEFORE and "bytes" in document:
        tensors = document.pop("bytes")
        document |= {"tensor_bytes": tensors, "budget": None}
    try:
        found = TypeAdapter(PlanFile).validate_python({"budget": None, "bytes": None, "kl": None, **document})
    except ValidationError as error:
        raise _refusal(error, text, thing) from None
    tensors = {
        name: replace(entry, type=_known(entry.type, found.container, name, text, thing))
        for name, entry in found.tensors.items()
    }
    return replace(found, tensors=tensors)


def _refuse_depth(text: str) -> None:
    """A parser's time grows with the square of a key's depth, `a.a.a.a = 1`, and no plan has any.

    Raises ValueError.  Without strings of several lines, left to right is how TOML is read.
    """
    bare = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", text)
    if '"""' in bare or "'''" in bare:
        raise ValueError("strings of several lines are not for plans")
    if _DEEP.search(bare):
        raise ValueError("a line has too many dots outside quotes")


def _known(kind: str, container: str, tensor: str, text: str, thing: str) -> str:
    """A type's own name.  Raises UsageError, naming the tensor and its line, where it is not known."""
    if not container and kind.upper() in quantized_types():
        return kind.upper()
    reason, way_out = f"type {_quoted(kind)[:80]} is not known", f"Choose one of {', '.join(quantized_types())}."
    if container:
        try:
            return codec(kind, _ANY_COLUMNS).name
        except UsageError as error:
            reason, way_out = error.reason, error.way_out
    raise UsageError(_place_of(tensor, text, thing), reason, way_out)


def _refusal(error: ValidationError, text: str, thing: str) -> UsageError:
    """The first fault as a person reads it: a key that no plan has, or else the first that is wrong."""
    faults = error.errors(include_url=False, include_input=False)
    fault = next((fault for fault in faults if fault["type"] == "unexpected_keyword_argument"), faults[0])
    kind, where, keys = fault["type"], fault["loc"], ["format", *(field.name for field in fields(PlanFile))]
    if where[0] == "tensors" and len(where) > 1:
        thing, keys = _place_of(str(where[1]), text, thing), [field.name for field in fields(PlanEntry)]
        where = where[2:]
    if not where:
        return UsageError(thing, "is no table", 'Write it like { type = "Q4_K", bytes = 36864 }.')
    key = str(where[0])
    if kind == "unexpected_keyword_argument":
        known = f"Take it out; the keys are {', '.join(sorted(keys))}."
        return UsageError(thing, f"has a key {_quoted(key)[:80]} that no plan has", known)
    must = _MUST_BE.get((key, kind)) or _MUST_BE.get((key, ""), "a string")
    reason = f"has no `{key}`" if kind == "missing" else f"`{key}` must be {must}"
    return UsageError(thing, reason, "Mend it, or plan again.")


def _place_of(tensor: str, text: str, thing: str) -> str:
    """The file, the line where a tensor's entry begins, and the tensor."""
    starts = (_quoted(tensor), tensor)
    line = next((at for at, line in enumerate(text.split("\n"), 1) if line.lstrip().startswith(starts)), None)
    return f"{thing}{f', line {line}' if line else ''}: {_quoted(tensor)}"
