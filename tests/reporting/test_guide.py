"""The guide has no dead ends, and what it says to type is what the command line takes."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import CliRunner

import dither
from dither.cli import app
from dither.errors import FormatError
from dither.reporting import texts
from dither.reporting.guide import Guide, guide, whole

DEMO = Path(__file__).parents[2] / "src/dither/demo_model"
PLANNED = ("serve",)  # commands of another room, which may be younger than this one
GUIDE = guide()
QUESTIONS, METHODS, ARITHMETIC = GUIDE["questions"], GUIDE["methods"], GUIDE["arithmetic"]
ANSWERS = GUIDE["answers"].items()


def steps(kind: str) -> list[str]:
    found = [step for _, answer in ANSWERS for step in (*answer["steps"], *answer["better"])]
    return sorted({step["command"] for step in found if step["kind"] == kind})


def commands_of(program: str) -> list[str]:
    return [command for command in steps("sh") if command.split()[0] == program]


def test_every_combination_ends_in_commands_and_rules_out_all_the_others() -> None:
    options = [[option["id"] for option in question["options"]] for question in QUESTIONS]
    paths = ["/".join(path) for path in product(*options)]
    assert len(paths) == 24 and set(paths) == set(GUIDE["answers"])
    methods = {entry["method"] for entry in METHODS}
    for path, answer in ANSWERS:
        assert any(step["command"] for step in answer["steps"]), path
        assert all(step["command"] and step["why"] for step in (*answer["steps"], *answer["better"])), path
        ruled_out = {entry["method"]: entry["reason"] for entry in answer["ruled_out"]}
        assert {answer["method"], *ruled_out} == methods, path
        assert all(len(reason) > 20 for reason in ruled_out.values()), path
        assert bool(answer["better"]) == bool(answer["better_why"]), path
        assert answer["because"] and answer["title"], path


def test_it_is_json() -> None:
    assert json.loads(json.dumps(GUIDE, allow_nan=False)) == GUIDE


@pytest.mark.parametrize("command", commands_of("dither"))
def test_the_command_line_takes_what_the_guide_says(command: str) -> None:
    """Parsed by the real commands, options and types checked; nothing runs."""
    name, *words = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    if name in PLANNED and name not in group.commands:
        pytest.skip(f"`dither {name}` is not part of this build")
    known = group.commands[name]
    filled = [{"MODEL": str(DEMO), "MERGED": str(DEMO), "DATA": "text.txt"}.get(word, word) for word in words]
    known.make_context(name, filled)  # raises a UsageError where it would


PLANS = [command for command in commands_of("dither") if " quantize " in command and "--evidence" not in command]


@pytest.mark.parametrize("command", PLANS)
def test_what_needs_no_data_can_really_be_planned(command: str) -> None:
    words = [str(DEMO) if word in ("MODEL", "MERGED") else word for word in shlex.split(command)[1:]]
    done = CliRunner().invoke(typer.main.get_command(app), [*words, "--dry-run"])
    assert done.exit_code == 0, done.output


def test_what_needs_data_names_formats_that_can_be_planned() -> None:
    wanted = {re.search(r"--to (\S+)", command)[1] for command in commands_of("dither") if "--evidence" in command}  # type: ignore[index]
    assert wanted == {"Q4_K_M", "gptq", "w4a16", "w8a8"}
    for to in sorted(wanted):
        words = ["quantize", str(DEMO), "--to", to, "--dry-run"]
        assert CliRunner().invoke(typer.main.get_command(app), words).exit_code == 0


def test_python_to_copy_is_python_and_calls_what_there_is() -> None:
    assert steps("python")
    for code in steps("python"):
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        load = next(call for call in calls if ast.unparse(call.func) == "dither.load")
        words = {key.arg: ast.literal_eval(key.value) for key in load.keywords if key.arg}
        inspect.signature(dither.load).bind(*map(ast.literal_eval, load.args), **words)


def test_programs_that_are_not_ours_are_named() -> None:
    for _, answer in ANSWERS:
        for step in (*answer["steps"], *answer["better"]):
            ours = step["kind"] == "python" or step["command"].split()[0] == "dither"
            assert ours == (not step["needs"]), step


def test_each_method_has_a_word_on_each_factor() -> None:
    names = [factor["id"] for factor in GUIDE["factors"]]
    for entry in METHODS:
        assert set(entry) == {"method", *names}
        assert all(text and mark in ("+", "-", "") for text, mark in (entry[name] for name in names))


def test_the_arithmetic_is_the_known_one() -> None:
    gigabytes = [ARITHMETIC["example"] * bits / 8 / 1e9 for bits in ARITHMETIC["bits"]]
    assert gigabytes == [28, 14, 7, 3.5]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (('tag = "literature"', 'tag = "hearsay"'), "tag"),
        (("[steps.fit]", "[steps.fitt]"), "the step 'fit', which is not among `steps`"),
        (('"laptop/run/*", "mac/run/*", "gpu/run/*"', '"laptop/run/*", "mac/run/*"'), "the method of gpu/run/yes"),
        (('"*/tune/no"', '"*/tunes/no"'), "'*/tunes/no' fits no combination"),
        (('for = ["*/tune/yes"]\nGGUF', 'for = ["*/tune/yes"]\nGGML'), "why GGUF is not the answer to laptop/tune/yes"),
        (('id = "qat"\ntitle', 'id = "qat"\ntittle'), "in the entry 'qat', topics.2.title"),
    ],
)
def test_a_slip_of_the_pen_is_told_by_its_file_and_entry(changed: tuple[str, str], said: str) -> None:
    text = (Path(str(files(texts))) / "guide.toml").read_text("utf-8")
    assert changed[0] in text
    with pytest.raises(FormatError, match=r"^texts/guide\.toml: ") as caught:
        whole(texts.parse(text.replace(*changed, 1), "guide.toml", Guide))
    assert said in str(caught.value)


def test_what_is_no_toml_names_its_line() -> None:
    with pytest.raises(FormatError, match=r"texts/guide\.toml: is no TOML: .*line 2"):
        texts.parse('tag = "told"\nsource: 1', "guide.toml", Guide)


def test_lines_of_a_paragraph_are_one_and_those_of_a_command_stay() -> None:
    for entry in (*GUIDE["topics"], *(answer for _, answer in ANSWERS)):
        assert "\n" not in entry.get("text", "") + entry.get("because", "")
    assert all(code.count("\n") > 4 and not code.startswith("\n") for code in steps("python"))
