"""The page's forms of jobs, made of the command line's own options.

An option's name, help, default, and whether it is needed come from typer; solvers, transforms and types from their
registries.  What only a page has stands in the table: which options it shows and in which order, what it calls
them, what a value must look like, which are folded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dither.dashboard.forms import FormField, JobForm

_FORMS = {
    "quantize": "model to size bpw memory max_kld plan evidence solver measure output transform types context "
    "threads device force",
    "plan": "model size bpw memory max_kld evidence solver output transform types context threads device force",
    "measure": "files against data tokens context device",
    "calibrate": "model data tokens output gradients context threads device force",
}
# What a page adds to an option: its placeholder stands where the option has no default, its hint behind the help.
_SHOWN = {
    "model": FormField("Model", "path", "path/to/model"),
    "files": FormField("Files", "paths", "model-Q4_K_M.gguf", "One a line."),
    "against": FormField("Original", "path", "path/to/model"),
    "to": FormField("Type", "name", "Q4_K_M", one_of="target"),
    "size": FormField("Size of the file", "size", "4.2GiB", one_of="target"),
    "bpw": FormField("Bits per weight", "number", "4.5", one_of="target"),
    "memory": FormField("Memory while it runs", "size", "8GiB", one_of="target"),
    "max_kld": FormField("KL divergence at most", "number", "0.02", one_of="target"),
    "plan": FormField("A plan", "path", "plan.toml", one_of="target"),
    "evidence": FormField("Evidence", "path", "evidence"),
    "solver": FormField("Solver", "choice"),
    "measure": FormField("Measure what it cost", "flag", hint="It is then on this page too. A budget always measures."),
    "data": FormField("Text", "path", "self"),
    "tokens": FormField("Tokens", "integer", "9216"),
    "gradients": FormField("Gradients too", "flag"),
    "output": FormField("Write to", "path"),
    "quantize.output": FormField(
        "Write to", "path", "beside the others", "In the folder this page began in.", more=True
    ),
    "transform": FormField("Rewrite the model first", "choice", more=True),
    "types": FormField("Choose among", "names", "Q3_K,Q4_K,Q6_K", "With a budget.", more=True),
    "context": FormField("Context", "integer", "512", more=True),
    "threads": FormField("Threads", "integer", "all cores", more=True),
    "device": FormField("Device", "choice", more=True),
    "force": FormField("Replace what is already there", "flag", more=True),
}


def forms(program: Any) -> Iterator[JobForm]:
    """The forms, in the order of the page, of the commands that typer made of `program`."""
    from dither.containers.folders import schemes
    from dither.containers.presets import preset_names
    from dither.solvers import solver_names
    from dither.transforms import transform_names

    choices = {
        "to": (*preset_names(), *schemes()),
        "solver": solver_names(),
        "transform": transform_names(),
        "device": ("cpu", "cuda"),
    }
    for kind, names in _FORMS.items():
        command = program.commands[kind]
        options = {option.name: option for option in command.params}
        shown = {name: _SHOWN.get(f"{kind}.{name}") or _SHOWN[name] for name in names.split()}
        fields = (_field(options[name], field, choices.get(name, ())) for name, field in shown.items())
        yield JobForm(kind, kind.capitalize(), command.help, tuple(fields))


def _field(option: Any, shown: FormField, choices: tuple[str, ...]) -> FormField:
    default = "" if option.default is None or shown.kind in ("flag", "choice") else str(option.default)
    return replace(
        shown,
        name=option.name,
        option=next((word for word in option.opts if word.startswith("--")), ""),
        hint=f"{option.help} {shown.hint}".strip(),
        placeholder=default or shown.placeholder,
        choices=choices,
        required=option.required,
    )
