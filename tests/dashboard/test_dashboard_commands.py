"""Forms and the commands they stand for: read back by a shell's rules and the command line's own parser."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from typer.main import get_command

from dither.cli import app
from dither.dashboard.commands import FORMS, SOLVERS, TRANSFORMS, build, forms
from dither.errors import UsageError
from dither.solvers import solver_names
from dither.transforms import TRANSFORMS as KNOWN_TRANSFORMS


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """What the command line understands of a command: its own parser, nothing run."""
    name, *rest = words
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, list(rest)).params)


def test_every_option_of_every_form_is_one_of_the_command_line() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for form in FORMS.values():
        options = {option for parameter in commands[form.kind].params for option in parameter.opts}
        assert {field.option for field in form.fields if field.option} <= options
        assert "--json" in options


def test_the_choices_are_all_there_are() -> None:
    """They are written down, since finding them imports every solver, and a page should open at once."""
    assert sorted(SOLVERS) == sorted(solver_names())
    assert TRANSFORMS == KNOWN_TRANSFORMS


def test_a_filled_form_is_understood_as_it_was_meant() -> None:
    fields = {
        "model": "my models/it's $HOME.gguf",
        "size": "4.2 GiB",
        "evidence": "-evidence",
        "solver": "gptq",
        "transform": "awq",
        "types": "Q4_K, Q6_K",
        "threads": 3,
        "force": True,
        "measure": False,
    }
    command = build("quantize", fields)
    assert command.problems == ()
    found = parsed(command.words)
    assert found["model"] == "my models/it's $HOME.gguf"
    assert found["size"] == "4.2GiB" and found["to"] is None
    assert str(found["evidence"]) == "-evidence" or str(found["evidence"]) == "./-evidence"
    assert (found["solver"], found["transform"], found["types"]) == ("gptq", ["awq"], "Q4_K,Q6_K")
    assert (found["threads"], found["force"], found["measure"]) == (3, True, False)
    assert shlex.split(command.line) == ["dither", *command.words]


def test_files_are_one_a_line() -> None:
    command = build("measure", {"files": "a b.gguf\n\n  -c.gguf \n", "against": "model"})
    assert command.problems == ()
    assert parsed(command.words)["files"] == ["a b.gguf", "./-c.gguf"]


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        ("quantize", {}, "model"),
        ("quantize", {"model": "m"}, "target"),
        ("quantize", {"model": "m", "to": "Q4_K_M", "size": "4GiB"}, "target"),
        ("quantize", {"model": "m", "to": "--force"}, "to"),
        ("quantize", {"model": "m", "to": "Q4_K_M; rm -rf ~"}, "to"),
        ("quantize", {"model": "m", "size": "much"}, "size"),
        ("quantize", {"model": "m", "size": "-1"}, "size"),
        ("quantize", {"model": "m", "bpw": "nan"}, "bpw"),
        ("quantize", {"model": "m", "bpw": True}, "bpw"),
        ("quantize", {"model": "m\nrm", "to": "Q8_0"}, "model"),
        ("quantize", {"model": "m\0", "to": "Q8_0"}, "model"),
        ("quantize", {"model": ["m"], "to": "Q8_0"}, "model"),
        ("quantize", {"model": "m" * 5000, "to": "Q8_0"}, "model"),
        ("quantize", {"model": "m", "to": "Q8_0", "solver": "magic"}, "solver"),
        ("quantize", {"model": "m", "to": "Q8_0", "threads": "0"}, "threads"),
        ("quantize", {"model": "m", "to": "Q8_0", "force": "yes"}, "force"),
        ("quantize", {"model": "m", "to": "Q8_0", "--pre": "x"}, "--pre"),
        ("measure", {"files": "a", "against": ""}, "against"),
        ("measure", {"files": ["a"] * 100, "against": "m"}, "files"),
    ],
)
def test_what_a_field_does_not_allow_is_told_beside_it(kind: str, fields: dict[str, Any], field: str) -> None:
    assert field in {problem["field"] for problem in build(kind, fields).problems}


def test_an_open_form_shows_what_is_to_be_filled_in() -> None:
    assert build("quantize", {}).line == "dither quantize MODEL --to TYPE"
    assert build("measure", {}).line == "dither measure FILES --against AGAINST"


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UsageError, match="quantize, plan, measure, calibrate"):
        build("chat", {})
    assert [form["kind"] for form in forms()] == ["quantize", "plan", "measure", "calibrate"]
