"""`dither calibrate` as a person or a script meets it."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dither.cli.calibrate import calibrate, copyable_command
from dither.measuring.calibrate import DEFAULT_TOKENS
from models.families_util import TEXT

pytestmark = pytest.mark.slow  # real engines: `make test` runs it, `make check` does not

app = typer.Typer()
app.command()(calibrate)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process: importing torch once is enough."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "80", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 4)
    return path


def test_one_json_document(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    code, stdout, _ = run(checkpoint, "--data", text, "--tokens", 320, "-c", 32, "--threads", 1, "-o", out, "--json")
    document = json.loads(stdout)
    assert code == 0
    assert (document["tokens"], document["sequences"], document["context"]) == (320, 10, 32)
    assert document["blocks"] == 2
    assert document["hessians"] is True
    assert document["bytes"] == sum(entry.stat().st_size for entry in out.iterdir())
    manifest = json.loads((out / "evidence.json").read_text())
    assert sorted(entry.name for entry in out.iterdir()) == sorted(
        ["evidence.json", "imatrix.gguf", "tokens.npz", *manifest["files"]]
    )


def test_people_read_what_was_learnt_and_what_comes_next(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "my evidence"
    code, stdout, _ = run(
        checkpoint, "--data", text, "--tokens", 320, "-c", 32, "--threads", 1, "-o", out, "--no-hessians"
    )
    assert code == 0
    told = " ".join(stdout.split())
    assert "mean squares of the inputs of 15 matrices in 2 blocks" in told
    assert "Learnt from 320 tokens in 10 sequences of 32: book.txt" in told
    assert f"--to Q4_K_M --evidence '{out}'" in stdout


def test_gradients_are_told_of(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    common = ("--data", text, "--tokens", 320, "-c", 32, "--threads", 1)
    documents = {}
    for name, flags in (("plain", ()), ("pulled", ("--gradients",))):
        code, stdout, _ = run(checkpoint, *common, "-o", tmp_path / name, *flags, "--json")
        assert code == 0
        documents[name] = json.loads(stdout)
    assert [documents[name]["gradients"] for name in ("plain", "pulled")] == [False, True]
    assert documents["plain"].keys() == documents["pulled"].keys()
    files = [{entry.name for entry in (tmp_path / name).iterdir()} for name in documents]
    assert files[0] == files[1]  # no hidden states are left
    assert documents["pulled"]["bytes"] > documents["plain"]["bytes"]
    code, stdout, _ = run(checkpoint, *common, "-o", tmp_path / "told", "--gradients")
    assert code == 0
    told = " ".join(stdout.split())
    assert "mean squares, Hessians and output Hessians of the inputs of 15 matrices in 2 blocks" in told
    code, stdout, _ = run(checkpoint, *common, "-o", tmp_path / "no", "--gradients", "--no-hessians", "--json")
    assert code == 2
    assert json.loads(stdout)["error"]["thing"] == "--gradients"
    assert not (tmp_path / "no").exists()


def test_errors_are_documents_with_an_exit_code(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    common = ("--tokens", 64, "-c", 32, "--threads", 1, "-o", out, "--json")
    code, stdout, _ = run(checkpoint, "--data", tmp_path / "none.txt", *common)
    assert (code, json.loads(stdout)["error"]["reason"]) == (1, "no such file")
    code, stdout, _ = run(checkpoint, "--data", text, "--tokens", 64, "-c", 4096, "-o", out, "--json")
    assert code == 2
    assert "longer than" in json.loads(stdout)["error"]["reason"]
    assert not out.exists()
    assert run(checkpoint, "--data", text, "--no-hessians", *common)[0] == 0
    code, stdout, stderr = run(checkpoint, "--data", text, "--no-hessians", *common)
    assert code == 1
    assert "--force" in json.loads(stdout)["error"]["way_out"]
    assert "holds evidence already" in " ".join(stderr.split())
    assert run(checkpoint, "--data", text, "--no-hessians", "--force", *common)[0] == 0


def test_commands_can_be_copied_whatever_the_names() -> None:
    words = ["dither", "quantize", "-my model", "--to", "Q4_K_M", "--evidence", "e v"]
    assert copyable_command(words) == "dither quantize './-my model' --to Q4_K_M --evidence 'e v'"


def test_command_and_function_ask_for_the_same_number_of_tokens() -> None:
    assert signature(calibrate).parameters["tokens"].default == DEFAULT_TOKENS
