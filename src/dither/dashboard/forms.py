"""Forms of the page, and the command lines they stand for.

A form says which options it has; the page draws its fields from it, and `Forms.command` makes the command from
what was typed.  Nothing else gets into a command: an unknown field, a value that its kind does not allow, or
text that would be read as an option is a problem, told beside its field.  No shell is ever involved: a
command is a list of words, and the quoted line is for people to copy.

The forms themselves are made of the command line's own options, above here (`cli/forms.py`).
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dither.errors import UsageError
from dither.units import parse_bytes

LONGEST = 4096  # characters of a value
MOST = 64  # values of a field that takes several
_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_SHAPES = {  # by kind: what a value looks like, and what is said of one that does not
    "name": (_NAME, "is not a name: letters, digits, _ . and - only"),
    "names": (f"({_NAME}(,{_NAME})*)?", "is not a name: letters, digits, _ . and - only"),
    "integer": ("0*[1-9][0-9]{0,11}", "is not a whole number above zero"),
    "number": (r"\+?(?=[0.]*[1-9])[0-9]{0,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,2})?", "is not a positive number"),
}


@dataclass(frozen=True)
class FormField:
    """One option of a command, as a form shows it.

    `kind`: text, name (a type, a hub's word), names (several, comma-separated), path, paths (one a line),
    size, number, integer, flag, choice.  `choices` are all there are for a choice, and suggestions for a name.
    Of the fields with the same `one_of` a command takes one.  `more` fields are folded away at first.
    """

    label: str
    kind: str
    placeholder: str = ""
    hint: str = ""
    one_of: str = ""
    more: bool = False
    name: str = ""
    option: str = ""  # none: a word on its own
    choices: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class JobForm:
    kind: str
    label: str
    says: str
    fields: tuple[FormField, ...]


@dataclass(frozen=True)
class Command:
    """`words` after `dither`; `line` to copy; `problems` by field, and none where it may run."""

    words: tuple[str, ...]
    problems: tuple[Mapping[str, str], ...]

    @property
    def line(self) -> str:
        return shlex.join(["dither", *self.words])

    def to_json(self) -> dict[str, Any]:
        return {"command": self.line, "problems": [dict(problem) for problem in self.problems]}


class Forms:
    """All forms.  They are made when they are first asked for: finding every solver takes a moment that a page
    should not wait for."""

    def __init__(self, make: Callable[[], Iterable[JobForm]]) -> None:
        self._make = make

    @cached_property
    def by_kind(self) -> dict[str, JobForm]:
        return {form.kind: form for form in self._make()}

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(form) for form in self.by_kind.values()]

    def command(self, kind: str, fields: Mapping[str, object]) -> Command:
        """The command of a form as it was filled in.  Raises UsageError where there is no such form."""
        if kind not in self.by_kind:
            raise UsageError(f"a job {kind[:60]!r}", "is not known", f"There are: {', '.join(self.by_kind)}.")
        return _command(self.by_kind[kind], fields)


def _command(form: JobForm, fields: Mapping[str, object]) -> Command:
    known = {field.name for field in form.fields}
    problems = [_problem(name, "is not in this form") for name in fields if name not in known]
    words: list[str] = []
    alone: list[str] = []
    chosen: Counter[str] = Counter()
    for field in form.fields:
        try:
            values = _values(field, fields.get(field.name))
        except ValueError as error:
            problems.append(_problem(field.name, str(error)))
            chosen[field.one_of] += 1  # there is one, if a bad one
            continue
        if field.required and not values:
            problems.append(_problem(field.name, "is needed"))
            values = [field.name.upper()]  # as a manual writes what is to be filled in; it cannot run so
        chosen[field.one_of] += bool(values)
        if not field.option:
            alone += values
        elif field.kind == "flag":
            words += values
        else:
            words += [word for value in values for word in (field.option, value)]
    for group in dict.fromkeys(field.one_of for field in form.fields if field.one_of):
        if chosen[group] > 1:
            problems.append(_problem(group, "must be one, not several"))
        elif not chosen[group]:
            problems.append(_problem(group, "is needed"))
            first = next(field for field in form.fields if field.one_of == group)
            words += [first.option, first.label.split()[0].upper()]
    return Command((form.kind, *alone, *words), tuple(problems))


def _problem(field: str, reason: str) -> Mapping[str, str]:
    return {"field": str(field)[:60], "reason": reason}


def _values(field: FormField, given: object) -> list[str]:
    """The words of a value; none where the field was left open.  Raises ValueError with the reason."""
    if given in (None, "", []):
        return []
    if field.kind == "flag":
        if not isinstance(given, bool):
            raise ValueError("is either on or off")
        return [field.option] if given else []
    if field.kind == "paths":
        lines = given.splitlines() if isinstance(given, str) else given
        if not isinstance(lines, Sequence) or len(lines) > MOST:
            raise ValueError(f"is a list of at most {MOST}")
        return [_word(field, text) for text in map(_text, lines) if text]
    return [_word(field, text)] if (text := _text(given)) else []


def _text(given: object) -> str:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = repr(given)
    if not isinstance(given, str):
        raise ValueError("is not a text")
    if len(given) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    if not given.isprintable():
        raise ValueError("has characters that cannot be printed")
    return given.strip()


def _word(field: FormField, text: str) -> str:
    """A value as the command line takes it."""
    if field.kind in ("path", "paths"):
        return f"./{text}" if text.startswith("-") else text  # begins with a dash, and is a file's name all the same
    if field.kind == "choice" and text not in field.choices:
        raise ValueError(f"is not one of {', '.join(field.choices)}")
    if field.kind == "size":
        try:
            parse_bytes(text, least=1)
        except UsageError as error:
            raise ValueError(f"{error.reason}; {error.way_out}".rstrip("; ")) from None
        return text.replace(" ", "")
    if field.kind == "names":
        text = ",".join(part.strip() for part in text.split(",") if part.strip())
    pattern, reason = _SHAPES.get(field.kind, (".*", ""))
    if not re.fullmatch(pattern, text):
        raise ValueError(reason)
    return text.removeprefix("+")
