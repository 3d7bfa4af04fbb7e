"""Forms of the page, and the command lines they stand for.

One table says which options a form has; the page draws its fields from it, and `build` makes the command from
what was typed.  Nothing else gets into a command: an unknown field, a value that its kind does not allow, or
text that would be read as an option is a problem, told beside its field.  No shell is ever involved: a
command is a list of words, and the quoted line is for people to copy.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dither.errors import UsageError
from dither.units import parse_bytes

LONGEST = 4096  # characters of a value
MOST = 64  # values of a field that takes several
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

SOLVERS = ("nearest", "half-quadratic", "scales", "gptq", "learned")
TRANSFORMS = ("awq", "rotate")


@dataclass(frozen=True)
class Field:
    """One option of a command, as a form shows it.

    `kind`: text, name (a type, a hub's word), names (several, comma-separated), path, paths (one a line),
    size, number, integer, flag, choice.  Of the fields with the same `one_of` a command takes one.  `more`
    fields are folded away at first.
    """

    name: str
    label: str
    kind: str
    option: str = ""  # none: a word on its own
    hint: str = ""
    placeholder: str = ""
    choices: tuple[str, ...] = ()
    required: bool = False
    one_of: str = ""
    more: bool = False


@dataclass(frozen=True)
class Form:
    kind: str
    label: str
    says: str
    fields: tuple[Field, ...]


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


_MODEL = Field(
    "model",
    "Model",
    "path",
    hint="A checkpoint's folder, a GGUF of full precision, or a hub's name.",
    placeholder="path/to/model",
    required=True,
)
_BUDGETS = (
    Field("size", "Size of the file", "size", "--size", placeholder="4.2GiB", one_of="target"),
    Field("bpw", "Bits per weight", "number", "--bpw", placeholder="4.5", one_of="target"),
    Field(
        "memory",
        "Memory while it runs",
        "size",
        "--memory",
        placeholder="8GiB",
        one_of="target",
        hint="Context included: 8192 tokens unless said otherwise.",
    ),
    Field(
        "max_kld",
        "KL divergence at most",
        "number",
        "--max-kld",
        placeholder="0.02",
        one_of="target",
        hint="The smallest file that loses no more.",
    ),
)
_EVIDENCE = Field(
    "evidence",
    "Evidence",
    "path",
    "--evidence",
    placeholder="evidence",
    hint="The folder that “calibrate” wrote. Without it, a budget learns its own first.",
)
_SOLVER = Field(
    "solver", "Solver", "choice", "--solver", choices=SOLVERS, hint="Left open: gptq where the evidence allows."
)
_TRANSFORM = Field("transform", "Rewrite the model first", "choice", "--transform", choices=TRANSFORMS, more=True)
_THREADS = Field("threads", "Threads", "integer", "--threads", placeholder="all cores", more=True)
_DEVICE = Field("device", "Device", "choice", "--device", choices=("cpu", "cuda"), more=True)
_FORCE = Field("force", "Replace what is already there", "flag", "--force", more=True)
_TYPES = Field(
    "types",
    "Choose among",
    "names",
    "--types",
    placeholder="Q3_K,Q4_K,Q6_K",
    more=True,
    hint="With a budget: types the plan may use.",
)
_CONTEXT = Field(
    "context",
    "Context",
    "integer",
    "--context",
    placeholder="8192",
    more=True,
    hint="With a budget of memory: tokens of a conversation.",
)
_SEQUENCE = Field("context", "Tokens of a sequence", "integer", "--context", placeholder="512", more=True)

FORMS: Mapping[str, Form] = {
    form.kind: form
    for form in (
        Form(
            "quantize",
            "Quantize",
            "Write a smaller file: of a type, or of whatever types meet a budget best.",
            (
                _MODEL,
                Field(
                    "to",
                    "Type",
                    "name",
                    "--to",
                    placeholder="Q4_K_M",
                    one_of="target",
                    hint="A GGUF type, or a format of GPUs: gptq, awq, nf4, fp8 …",
                ),
                *_BUDGETS,
                Field("plan", "A plan", "path", "--plan", placeholder="plan.toml", one_of="target"),
                _EVIDENCE,
                _SOLVER,
                Field(
                    "measure",
                    "Measure what it cost",
                    "flag",
                    "--measure",
                    hint="The KL divergence goes into the file and onto this page. A budget always measures.",
                ),
                Field(
                    "output",
                    "Write to",
                    "path",
                    "--output",
                    placeholder="beside the others",
                    more=True,
                    hint="Left open: the model's name and the type's, in the folder this page began in.",
                ),
                _TRANSFORM,
                _TYPES,
                _CONTEXT,
                _THREADS,
                _DEVICE,
                _FORCE,
            ),
        ),
        Form(
            "plan",
            "Plan",
            "Choose every tensor's type for a budget, and write nothing but that choice.",
            (
                _MODEL,
                *_BUDGETS,
                _EVIDENCE,
                _SOLVER,
                Field("output", "Write to", "path", "--output", placeholder="plan.toml"),
                _TRANSFORM,
                _TYPES,
                _CONTEXT,
                _THREADS,
                _DEVICE,
                _FORCE,
            ),
        ),
        Form(
            "measure",
            "Measure",
            "Compare quantized files with their original: KL divergence, perplexity, top tokens.",
            (
                Field("files", "Files", "paths", hint="One a line.", placeholder="model-Q4_K_M.gguf", required=True),
                Field(
                    "against",
                    "Original",
                    "path",
                    "--against",
                    placeholder="path/to/model",
                    required=True,
                    hint="The model the files were made of.",
                ),
                Field(
                    "data",
                    "Text",
                    "path",
                    "--data",
                    placeholder="self",
                    hint="A text file; left open, the model writes the text itself.",
                ),
                Field("tokens", "Tokens", "integer", "--tokens", placeholder="8192"),
                _SEQUENCE,
                _DEVICE,
            ),
        ),
        Form(
            "calibrate",
            "Calibrate",
            "Run text through the model and keep which weights matter, for better files.",
            (
                _MODEL,
                Field(
                    "data",
                    "Text",
                    "path",
                    "--data",
                    placeholder="self",
                    hint="A text file like what the model will meet; left open, the model writes it.",
                ),
                Field("tokens", "Tokens", "integer", "--tokens", placeholder="32768"),
                Field("output", "Write to", "path", "--output", placeholder="evidence"),
                Field(
                    "gradients", "Gradients too", "flag", "--gradients", hint="Better files for three times the time."
                ),
                _SEQUENCE,
                _THREADS,
                _DEVICE,
                _FORCE,
            ),
        ),
    )
}


def forms() -> list[dict[str, Any]]:
    """What the page draws its forms from."""
    return [asdict(form) for form in FORMS.values()]


def build(kind: str, fields: Mapping[str, object]) -> Command:
    """The command of a form as it was filled in.  Raises UsageError where there is no such form."""
    form = FORMS.get(kind)
    if form is None:
        raise UsageError(f"a job {kind[:60]!r}", "is not known", f"There are: {', '.join(FORMS)}.")
    problems = [_problem(name, "is not in this form") for name in fields if name not in _names(form)]
    words: list[str] = []
    alone: list[str] = []
    chosen: dict[str, int] = {}
    for field in form.fields:
        try:
            values = _values(field, fields.get(field.name))
        except ValueError as error:
            problems.append(_problem(field.name, str(error)))
            chosen[field.one_of] = chosen.get(field.one_of, 0) + 1  # there is one, if a bad one
            continue
        if field.required and not values:
            problems.append(_problem(field.name, "is needed"))
            values = [field.name.upper()]  # as a manual writes what is to be filled in; it cannot run so
        if values:
            chosen[field.one_of] = chosen.get(field.one_of, 0) + 1
        if not field.option:
            alone += values
        elif field.kind == "flag":
            words += [field.option] if values else []
        else:
            words += [word for value in values for word in (field.option, value)]
    for group in dict.fromkeys(field.one_of for field in form.fields if field.one_of):
        if chosen.get(group, 0) != 1:
            few = not chosen.get(group)
            problems.append(_problem(group, "is needed" if few else "must be one, not several"))
            words += _unfilled(form, group) if few else []
    return Command((kind, *alone, *words), tuple(problems))


def _unfilled(form: Form, group: str) -> list[str]:
    first = next(field for field in form.fields if field.one_of == group)
    return [first.option, first.label.split()[0].upper()]


def _names(form: Form) -> set[str]:
    return {field.name for field in form.fields}


def _problem(field: str, reason: str) -> Mapping[str, str]:
    return {"field": str(field)[:60], "reason": reason}


def _values(field: Field, given: object) -> list[str]:
    """The words of a value; none where the field was left open.  Raises ValueError with the reason."""
    if given is None or given == "" or given == []:
        return []
    if field.kind == "flag":
        if not isinstance(given, bool):
            raise ValueError("is either on or off")
        return [field.option] if given else []
    if field.kind == "paths":
        lines = given.splitlines() if isinstance(given, str) else given
        if not isinstance(lines, Sequence) or len(lines) > MOST:
            raise ValueError(f"is a list of at most {MOST}")
        return [_path(_text(line)) for line in lines if _text(line)]
    text = _text(given)
    return [_CHECKS[field.kind](text) if field.kind in _CHECKS else _choice(field, text)] if text else []


def _text(given: object) -> str:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = repr(given)
    if not isinstance(given, str):
        raise ValueError("is no text")
    if len(given) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    if not given.isprintable():
        raise ValueError("has characters that cannot be printed")
    return given.strip()


def _path(text: str) -> str:
    """A name that begins with a dash is a file's all the same."""
    return f"./{text}" if text.startswith("-") else text


def _name(text: str) -> str:
    if not _TYPE.fullmatch(text):
        raise ValueError("is no name: letters, digits, _ . and - only")
    return text


def _several(text: str) -> str:
    return ",".join(_name(part.strip()) for part in text.split(",") if part.strip())


def _size(text: str) -> str:
    try:
        parse_bytes(text, least=1)
    except UsageError as error:
        raise ValueError(f"{error.reason}; {error.way_out}".rstrip("; ")) from None
    return text.replace(" ", "")


def _number(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is no number") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError("is no positive number")
    return text.removeprefix("+")


def _integer(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise ValueError("is no whole number above zero")
    return text


def _choice(field: Field, text: str) -> str:
    if text not in field.choices:
        raise ValueError(f"is none of {', '.join(field.choices)}")
    return text


_CHECKS = {"path": _path, "name": _name, "names": _several, "size": _size, "number": _number, "integer": _integer}
