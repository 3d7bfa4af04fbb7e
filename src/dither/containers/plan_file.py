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
import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.codecs import codec
from dither.containers.mix import exactly
from dither.containers.presets import quantized_types
from dither.errors import OutputError, UsageError
from dither.system.files import replace as replace_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FORMAT = 1
_ANY_COLUMNS = 4096  # of a matrix whose type is only to be named
_MOST_BYTES = 4 * 2**20  # of a plan file; a line per tensor of the largest models takes a tenth of it
_MOST = 2**63 - 1
_KEYS = {
    "format", "container", "model", "model_identity", "evidence", "solver", "transforms", "budget", "bytes",
    "kl", "notes", "tensors",
}  # fmt: skip
_STRING_OR_COMMENT = re.compile(r"""(\"{3}|'{3})|"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?|\#[^\n]*""")
_DEEP = re.compile(r"(?:\.[^.\n]*){9}")
_HEADER = """\
# A plan of Dither: which type every tensor becomes.
#
# To change one, write another type between the quotes, such as Q4_K, Q6_K or Q8_0.  Nothing else needs to
# change: `bytes` and `kl` (predicted KL divergence, nats per token) say what was planned and decide nothing.
# Lines of tensors may stand in any order; one that is taken out gets the type of the mix it is used with.
"""


@dataclass(frozen=True)
class PlanEntry:
    type: str
    bytes: int
    kl: float | None  # predicted, nats per token


@dataclass(frozen=True)
class PlanFile:
    """A plan.  `tensors` holds, in the file's order, the matrices whose type it decides."""

    model: str
    model_identity: str
    evidence: str  # sha256 of what the prediction came from, or ""
    solver: str
    transforms: tuple[str, ...]
    budget: int | None
    bytes: int
    kl: float | None
    tensors: Mapping[str, PlanEntry]
    notes: tuple[str, ...]
    container: str = ""  # a GPU format's name; "" for GGUF

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
        "bytes": str(plan.bytes),
        "kl": "" if plan.kl is None else repr(float(plan.kl)),
        "notes": "[" + "".join(f"\n    {_quoted(note)}," for note in plan.notes) + "\n]",
    }
    lines = [f"{key} = {value}" for key, value in values.items() if value]
    return "\n".join([_HEADER, *lines, "", "[tensors]", *_tensor_lines(plan.tensors), ""])


def _tensor_lines(tensors: Mapping[str, PlanEntry]) -> list[str]:
    """One per tensor, its parts below each other."""
    rows = []
    for name, planned in tensors.items():
        kl = "" if planned.kl is None else f", kl = {float(planned.kl)!r}"
        rows.append((_quoted(name), _quoted(planned.type) + ",", str(planned.bytes), kl))
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
    top = _Table(document, thing)
    version = top.integer("format")
    if version != _FORMAT:
        reason = f"has format {version}, and this Dither reads {_FORMAT}"
        raise UsageError(thing, reason, "Plan again, or upgrade with: pip install -U dither")
    top.refuse_others(_KEYS)
    container = top.string("container") if "container" in document else ""
    return PlanFile(
        model=top.string("model"),
        model_identity=top.string("model_identity"),
        evidence=top.string("evidence"),
        solver=top.string("solver"),
        transforms=top.strings("transforms"),
        budget=top.integer("budget") if "budget" in document else None,
        bytes=top.integer("bytes"),
        kl=top.kl(),
        tensors=_read_tensors(top.value("tensors", "a table", dict), text, thing, container),
        notes=top.strings("notes"),
        container=container,
    )


def _refuse_depth(text: str) -> None:
    """A parser's time grows with the square of a key's depth, `a.a.a.a = 1`, and no plan has any.

    Raises ValueError.  Without strings of several lines, left to right is how TOML is read.
    """
    bare = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", text)
    if '"""' in bare or "'''" in bare:
        raise ValueError("strings of several lines are not for plans")
    if _DEEP.search(bare):
        raise ValueError("a line has too many dots outside quotes")


def _read_tensors(tensors: dict[str, object], text: str, thing: str, container: str) -> dict[str, PlanEntry]:
    found = {}
    for name, value in tensors.items():
        try:
            found[name] = _read_type(_Table(value, thing), container)
        except UsageError as error:
            starts = (_quoted(name), name)
            lines = (at for at, line in enumerate(text.split("\n"), 1) if line.lstrip().startswith(starts))
            where = "".join(f", line {at}" for at in [next(lines, 0)] if at)
            raise UsageError(f"{thing}{where}: {_quoted(name)}", error.reason, error.way_out) from None
    return found


def _read_type(table: _Table, container: str) -> PlanEntry:
    table.refuse_others({"type", "bytes", "kl"})
    kind = table.string("type")
    if container:
        kind = codec(kind, _ANY_COLUMNS).name
        return PlanEntry(kind, table.integer("bytes"), table.kl())
    if kind.upper() not in quantized_types():
        raise UsageError(
            table.thing, f"type {_quoted(kind)[:80]} is not known", f"Choose one of {', '.join(quantized_types())}."
        )
    return PlanEntry(kind.upper(), table.integer("bytes"), table.kl())


class _Table:
    """A TOML table from anywhere: asks for values of a type, and says which key was none."""

    def __init__(self, values: object, thing: str) -> None:
        self.thing = thing
        if not isinstance(values, dict):
            raise UsageError(thing, "is no table", 'Write it like { type = "Q4_K", bytes = 36864 }.')
        self._values: dict[str, object] = values

    def value(self, key: str, what: str, *types: type) -> Any:
        if key not in self._values:
            raise UsageError(self.thing, f"has no `{key}`", "Mend it, or plan again.")
        value = self._values[key]
        if type(value) not in types:  # exactly: a boolean is an int to isinstance
            raise self._wrong(key, what)
        return value

    def string(self, key: str) -> str:
        return str(self.value(key, "a string", str))

    def strings(self, key: str) -> tuple[str, ...]:
        values = self.value(key, "a list of strings", list)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of strings")
        return tuple(values)

    def integer(self, key: str) -> int:
        value = int(self.value(key, "a whole number", int))
        if not 0 <= value <= _MOST:
            raise self._wrong(key, "a whole number from 0 to 2⁶³ − 1")
        return value

    def kl(self) -> float | None:
        if "kl" not in self._values:
            return None
        value = self.value("kl", "a number", int, float)
        if not (0 <= value <= _MOST and math.isfinite(value)):
            raise self._wrong("kl", "a finite number of at least 0")
        return float(value)

    def refuse_others(self, known: Collection[str]) -> None:
        others = [key for key in self._values if key not in known]
        if others:
            reason = f"has a key {_quoted(others[0])[:80]} that no plan has"
            raise UsageError(self.thing, reason, f"Take it out; the keys are {', '.join(sorted(known))}.")

    def _wrong(self, key: str, what: str) -> UsageError:
        return UsageError(self.thing, f"`{key}` must be {what}", "Mend it, or plan again.")
