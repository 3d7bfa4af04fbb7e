"""The command line as a person or a script meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dither.cli as dither_cli

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not


def dither(*arguments: object, cwd: Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dither", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "dumb"},
    )


def test_quantize_then_inspect(checkpoint: Path, tmp_path: Path) -> None:
    made = dither("quantize", checkpoint, "--to", "q4_k_m", "-o", "model.gguf", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["bytes"] == (tmp_path / "model.gguf").stat().st_size
    looked = json.loads(dither("inspect", "model.gguf", "--json", cwd=tmp_path).stdout)
    assert looked["file_type"] == "Q4_K_M"
    assert looked["bits_per_weight"] == document["bits_per_weight"]
    assert looked["types"] == document["types"]


def test_dry_run_promises_what_is_then_written(checkpoint: Path, tmp_path: Path) -> None:
    promised = dither("quantize", checkpoint, "--to", "Q5_K_M", "--dry-run", "--json", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    kept = dither("quantise", checkpoint, "--to", "Q5_K_M", "--json", cwd=tmp_path)
    promise, result = json.loads(promised.stdout), json.loads(kept.stdout)
    assert promise["tensor_bytes"] == result["tensor_bytes"]
    assert promise["bytes"] == result["bytes"] == Path(tmp_path, result["path"]).stat().st_size
    assert promise["types"] == result["types"]


def test_people_read_tables_of_eighty_columns(checkpoint: Path, tmp_path: Path) -> None:
    outputs = [
        dither("quantize", checkpoint, "--to", "Q4_K_M", "-o", "model.gguf", cwd=tmp_path),
        dither("quantize", checkpoint, "--to", "Q2_K", "--dry-run", cwd=tmp_path),
        dither("inspect", "model.gguf", "--tensors", cwd=tmp_path),
        dither("types", cwd=tmp_path),
        dither("--help", cwd=tmp_path),
    ]
    for output in outputs:
        assert output.returncode == 0, output.stderr
        assert max(map(len, output.stdout.splitlines())) <= 80
    assert "blk.0.attn_q.weight" in outputs[2].stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["quantize", "./no-such-folder", "--to", "Q4_K_M"], 1, "no such"),
        (["quantize", "{checkpoint}", "--to", "Q4_KM"], 2, "Q4_K_M"),
        (["quantize", "{checkpoint}"], 2, "--to"),
        (["quantize", "{checkpoint}", "--to", "Q4_K_M", "--tensor", "ffn"], 2, "REGEX=TYPE"),
        (["quantize", "{checkpoint}", "--to", "Q4_K_M", "-o", "no/folder/x.gguf"], 1, "no folder"),
        (["inspect", "{checkpoint}/config.json"], 1, "config.json"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_name_the_thing_on_stderr(
    checkpoint: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    failed = dither(*(a.format(checkpoint=checkpoint) for a in arguments), cwd=tmp_path, columns=300)
    assert failed.returncode == code, failed.stderr
    assert said in failed.stderr
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_json_document_too(tmp_path: Path) -> None:
    failed = dither("inspect", "nothing.gguf", "--json", cwd=tmp_path)
    assert failed.returncode == 1
    assert set(json.loads(failed.stdout)["error"]) == {"thing", "reason", "way_out"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_continues(checkpoint: Path, tmp_path: Path, number: int, code: int) -> None:
    script = (
        "import os, sys\n"
        "from dither.cli import main, screen\n"
        "class Stopping(screen.Meter):\n"
        "    def advance(self, amount, what):\n"
        f"        if what == 'blk.1.attn_q.weight': os.kill(os.getpid(), {int(number)})\n"
        "import dither.cli.quantize as command\n"
        "sys.modules['dither.cli.quantize'].Meter = Stopping\n"
        "main()"
    )
    request = ["quantize", str(checkpoint), "--to", "Q4_K_M", "-o", "model.gguf", "--threads", "1", "--json"]
    stopped = subprocess.run(
        [sys.executable, "-c", script, *request], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert stopped.returncode == code, stopped.stderr
    assert "the same command continues from there" in json.loads(stopped.stdout)["error"]["way_out"]
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "model.gguf").exists()
    resumed = json.loads(dither(*request, cwd=tmp_path).stdout)
    assert resumed["resumed_tensors"] > 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["types"], ["types", "--json"], ["inspect", "{checkpoint}", "--json"]])
def test_a_full_disk_behind_stdout_is_an_error_of_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str]
) -> None:
    words = [argument.format(checkpoint=checkpoint) for argument in arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        failed = subprocess.run(
            [sys.executable, "-m", "dither", *words],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert failed.returncode == 1
    assert failed.stderr == "error: standard output: No space left on device.\n"


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    for arguments in (["types"], ["types", "--json"], ["doctor", "--json"]):
        read, write = os.pipe()
        os.close(read)
        left = subprocess.run(
            [sys.executable, "-m", "dither", *arguments],
            cwd=tmp_path,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(write)
        assert (left.returncode, left.stderr) == (1, "")


def test_a_dry_run_has_every_note_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    dither("quantize", checkpoint, "--to", "Q8_0", "-o", "q8.gguf", cwd=tmp_path)
    request = ["quantize", "q8.gguf", "--to", "Q4_K_M", "--json"]
    promised = json.loads(dither(*request, "--dry-run", cwd=tmp_path).stdout)["notes"]
    assert promised == json.loads(dither(*request, cwd=tmp_path).stdout)["notes"]
    assert any("quantized already" in note for note in promised)


def test_the_command_to_go_on_with_can_be_pasted(checkpoint: Path, tmp_path: Path) -> None:
    name = "a model with a long name, which a narrow terminal may not break in two.gguf"
    made = dither("quantize", checkpoint, "--to", "Q8_0", "-o", name, cwd=tmp_path, columns=60)
    last = made.stdout.splitlines()[-1]
    assert shlex.split(last.removeprefix("Talk to it:")) == ["dither", "chat", name]


def test_a_folder_for_the_demo_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = dither("demo", "-o", "file", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: file: cannot be made a folder")


def test_names_from_a_file_cannot_drive_the_terminal(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "evil.gguf", "llama")
    writer.add_name("\x1b]0;owned\x07[bold red]model[/]")
    writer.add_tensor("blk.0.\x1b[31mw.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = dither("inspect", "evil.gguf", "--tensors", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stdout
    assert "[bold red]model[/]" in shown.stdout
    assert "None" not in shown.stdout  # what a file does not say is left out


def test_starting_is_light() -> None:
    """Neither torch nor transformers, nor any heavy room, for help and import."""
    script = (
        "import sys\n"
        "import dither, dither.cli\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'xllamacpp', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


COMMAND = """
import typer

import dither.cli as dither_cli

def hello(name: str) -> None:
    \"\"\"Say hello.\"\"\"
    typer.echo(f"hello {name}")

COMMANDS = {15: hello}
"""


def test_a_command_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine" / "dither" / "cli"
    folder.mkdir(parents=True)
    (folder / "hello.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"), prepend=os.pathsep)
    listed = re.findall(r"^  (\w+)  +\w", dither("--help", cwd=tmp_path).stdout.partition("Commands:")[2], re.M)
    assert listed[:4] == ["quantize", "hello", "calibrate", "plan"] and "quantise" not in listed
    assert dither("hello", "you", cwd=tmp_path).stdout == "hello you\n"


def test_another_installation_on_the_path_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs" / "dither" / "cli"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent):
        (place / "__init__.py").touch()
    (folder / "hello.py").write_text(COMMAND)
    ours = Path(dither_cli.__path__[0]).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ours), str(tmp_path / "theirs")]))
    assert dither("hello", "you", cwd=tmp_path).returncode == 2


def test_a_command_gives_the_handler_of_sigterm_back() -> None:
    """Of a program that calls commands in its own process."""
    from dither.cli.screen import stop_on_error
    from dither.errors import UsageError

    def own(number: int, frame: object) -> None:
        raise AssertionError("not to be called")

    before = signal.signal(signal.SIGTERM, own)
    try:
        with stop_on_error():
            assert signal.getsignal(signal.SIGTERM) is not own
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(typer.Exit), stop_on_error():
            raise UsageError("a", "b")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 5.00 GiB"), RuntimeError("can't start new thread")])
def test_running_out_of_memory_is_said_with_a_way_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dither.quantizing.quantize.quantize", refused)
    words = ["quantize", str(checkpoint), "--to", "Q4_K_M", "-o", str(tmp_path / "m.gguf")]
    runner, app = CliRunner(), dither_cli.app
    result = runner.invoke(app, words)
    assert result.exit_code == 1
    assert f"error: memory: ran out ({error})." in result.stderr
    assert "--max-memory SIZE" in result.stderr and "the same command continues" in result.stderr
    document = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert document["error"]["thing"] == "memory"
