"""Forms and the commands they stand for: read back by a shell's rules and the command line's own parser."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from typer.main import get_command

from dashboard.conftest import FORMS
from dither.cli import app
from dither.containers.folders import schemes
from dither.containers.presets import preset_names
from dither.errors import UsageError
from dither.solvers import solver_names
from dither.transforms import transform_names

build = FORMS.command


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """What the command line understands of a command: its own parser, nothing run."""
    name, *rest = words
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, list(rest)).params)


def test_every_option_of_every_form_is_one_of_the_command_line() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for form in FORMS.by_kind.values():
        options = {option for parameter in commands[form.kind].params for option in parameter.opts}
        assert {field.option for field in form.fields if field.option} <= options
        assert "--json" in options


def test_the_choices_are_all_there_are() -> None:
    for form in FORMS.by_kind.values():
        choices = {field.name: field.choices for field in form.fields if field.kind == "choice"}
        assert sorted(choices.get("solver", solver_names())) == sorted(solver_names())
        assert choices.get("transform", transform_names()) == transform_names()
    fields = {field.name: field for field in FORMS.by_kind["quantize"].fields}
    assert {"solver", "transform"} <= fields.keys()
    assert {*preset_names(), *schemes()} == {*fields["to"].choices}


def test_what_a_form_says_of_an_option_is_what_the_command_line_says() -> None:
    """Names, help, defaults and whether it is needed are typer's; none is spelled a second time."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for form in FORMS.by_kind.values():
        assert form.says == commands[form.kind].help
        options = {option.name: option for option in commands[form.kind].params}
        for field in form.fields:
            option = options[field.name]
            assert field.hint.startswith(option.help) and field.required == option.required
            if option.default is not None and field.kind not in ("flag", "choice"):
                assert field.placeholder == str(option.default)
            assert (field.kind == "flag") == bool(getattr(option, "is_flag", False))


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
    assert [form["kind"] for form in FORMS.to_json()] == ["quantize", "plan", "measure", "calibrate"]
