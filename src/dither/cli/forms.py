"""The page's forms of jobs, made of the command line's own options.

An option's name, help, default, and whether it is needed come from typer; solvers, transforms and types from their
registries.  What only a page has stands in the table: which options it shows and in which order, what it calls
them, what a value must look like, which are folded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dither.dashboard.forms import FormField, JobForm

_FORMS = {
    "quantize": "model to size bpw memory max_kld plan evidence solver measure output transform types context "
    "threads device force",
    "plan": "model size bpw memory max_kld evidence solver output transform types context threads device force",
    "measure": "files against data tokens context device",
    "calibrate": "model data tokens output gradients context threads device force",
}


@dataclass(frozen=True)
class _Shown:
    """How a page shows an option; `placeholder` where it has no default, `hint` added to its help."""

    label: str
    kind: str
    placeholder: str = ""
    hint: str = ""
    one_of: str = ""
    more: bool = False


_SHOWN = {
    "model": _Shown("Model", "path", "path/to/model"),
    "files": _Shown("Files", "paths", "model-Q4_K_M.gguf", "One a line."),
    "against": _Shown("Original", "path", "path/to/model"),
    "to": _Shown("Type", "name", "Q4_K_M", one_of="target"),
    "size": _Shown("Size of the file", "size", "4.2GiB", one_of="target"),
    "bpw": _Shown("Bits per weight", "number", "4.5", one_of="target"),
    "memory": _Shown("Memory while it runs", "size", "8GiB", one_of="target"),
    "max_kld": _Shown("KL divergence at most", "number", "0.02", one_of="target"),
    "plan": _Shown("A plan", "path", "plan.toml", one_of="target"),
    "evidence": _Shown("Evidence", "path", "evidence"),
    "solver": _Shown("Solver", "choice"),
    "measure": _Shown("Measure what it cost", "flag", hint="It is then on this page too. A budget always measures."),
    "data": _Shown("Text", "path", "self"),
    "tokens": _Shown("Tokens", "integer", "8192"),
    "gradients": _Shown("Gradients too", "flag"),
    "output": _Shown("Write to", "path"),
    "quantize.output": _Shown("Write to", "path", "beside the others", "In the folder this page began in.", more=True),
    "transform": _Shown("Rewrite the model first", "choice", more=True),
    "types": _Shown("Choose among", "names", "Q3_K,Q4_K,Q6_K", "With a budget.", more=True),
    "context": _Shown("Context", "integer", "512", more=True),
    "threads": _Shown("Threads", "integer", "all cores", more=True),
    "device": _Shown("Device", "choice", more=True),
    "force": _Shown("Replace what is already there", "flag", more=True),
}


def forms() -> Iterator[JobForm]:
    """The forms, in the order of the page."""
    from typer.main import get_command

    from dither.cli import app

    commands: Any = get_command(app)
    choices = _choices()
    for kind, names in _FORMS.items():
        command = commands.commands[kind]
        options = {option.name: option for option in command.params}
        fields = tuple(_field(options[name], _shown(kind, name), choices.get(name, ())) for name in names.split())
        yield JobForm(kind, kind.capitalize(), command.help, fields)


def _shown(kind: str, name: str) -> _Shown:
    return _SHOWN.get(f"{kind}.{name}") or _SHOWN[name]


def _field(option: Any, shown: _Shown, choices: tuple[str, ...]) -> FormField:
    default = "" if option.default is None or shown.kind in ("flag", "choice") else str(option.default)
    return FormField(
        name=option.name,
        label=shown.label,
        kind=shown.kind,
        option=next((word for word in option.opts if word.startswith("--")), ""),
        hint=f"{option.help} {shown.hint}".strip(),
        placeholder=default or shown.placeholder,
        choices=choices,
        required=option.required,
        one_of=shown.one_of,
        more=shown.more,
    )


def _choices() -> dict[str, tuple[str, ...]]:
    from dither.containers.folders import schemes
    from dither.containers.presets import preset_names
    from dither.quantizing.rewriting import TRANSFORMS
    from dither.solvers import solver_names

    return {
        "to": (*preset_names(), *schemes()),
        "solver": solver_names(),
        "transform": TRANSFORMS,
        "device": ("cpu", "cuda"),
    }
