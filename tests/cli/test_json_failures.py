"""With --json every run prints one document, whatever becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dither.cli import app
from dither.errors import SourceError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NAMES = sorted(COMMANDS)
WITH_JSON = [name for name in NAMES if any("--json" in parameter.opts for parameter in COMMANDS[name].params)]
NEEDY = [name for name in WITH_JSON if any(p.required for p in COMMANDS[name].params)]
OPENING = [name for name in NEEDY if COMMANDS[name].params[0].name in ("model", "files", "file")]
INSTEAD = {"quantize": ["--to", "Q4_0"], "quantise": ["--to", "Q4_0"], "plan": ["--bpw", "4"], "convert": ["o.gguf"]}
INSTEAD |= {"ladder": ["--sizes", "4MiB"], "measure": ["--against", "other"]}
INSTEAD |= {"answers": ["--against", "other"], "tasks": ["--tasks", "lambada"]}


def failed(*arguments: object) -> tuple[int, dict[str, str], Any]:
    """Exit code, the error of the one document on stdout, and the run."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    document = json.loads(found.stdout)
    assert set(document) == {"error"} and set(document["error"]) == {"thing", "reason", "way_out"}
    assert document["error"]["thing"] and document["error"]["reason"]
    return found.exit_code, document["error"], found


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_does_not_exist(name: str) -> None:
    code, error, found = failed(name, "--json", "--no-such-option")
    assert code == 2 and "no such option" in error["reason"] and error["thing"] == f"dither {name}"
    assert "Usage:" in found.stderr


@pytest.mark.parametrize("name", NEEDY)
def test_an_argument_that_is_missing(name: str) -> None:
    code, error, _ = failed(name, "--json")
    assert code == 2 and "missing" in error["reason"].lower()


@pytest.mark.parametrize("name", OPENING)
def test_a_model_that_cannot_be_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    code, error, found = failed(name, "empty.gguf", *INSTEAD.get(name, ()), "--json")
    assert code in (1, 2) and error["reason"] in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.gguf"]


@pytest.mark.parametrize("words", [["nope", "--json"], ["--json"], ["--nope", "--json"]])
def test_no_command_at_all(words: list[str]) -> None:
    assert failed(*words)[0] == 2


def test_a_near_miss_is_told() -> None:
    assert "Did you mean 'inspect'" in failed("inspekt", "model", "--json")[1]["reason"]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dither.reporting.inspect.inspect", stop)


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    code, error, _ = failed("inspect", "model", "--json")
    assert (code, error["reason"]) == (130, "was interrupted")


def test_ctrl_c_before_the_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dither.cli.inspect.stop_on_error", stop)
    code, error, _ = failed("inspect", "model", "--json")
    assert (code, error["reason"]) == (130, "was interrupted")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("division by zero"), monkeypatch)
    _, error, found = failed("inspect", "model", "--json")
    assert "ZeroDivisionError: division by zero" in error["reason"] and "report" in error["way_out"]
    assert isinstance(found.exception, ZeroDivisionError)  # which Python prints, and exits with 1


def test_a_file_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(OSError(28, "No space left on device", "model.gguf"), monkeypatch)
    code, error, _ = failed("inspect", "model", "--json")
    assert (code, error["thing"], error["reason"]) == (1, "model.gguf", "No space left on device")


def test_without_json_nothing_is_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(SourceError("m", "is none", "Name one."), monkeypatch)
    found = CliRunner().invoke(app, ["inspect", "model"])
    assert found.exit_code == 1 and found.stdout == "" and "m: is none. Name one." in found.stderr
