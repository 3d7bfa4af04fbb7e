"""Ctrl-C outside a command's own work: while modules load, between parsing and working, and after the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dither.cli import app

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a signal cannot be sent to oneself there")
STOP = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"


def run(script: str, *words: str, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line's own process, disturbed by `script` before it begins."""
    handler = "SIG_IGN" if ignored else "default_int_handler"  # whatever these tests were started with
    begin = f"import signal, sys\nsignal.signal(signal.SIGINT, signal.{handler})\n"
    code = f"{begin}{script}\nsys.argv[0] = 'dither'\nfrom dither.__main__ import main\nmain()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


WHILE_LOADING = f"""
class Finder:
    def find_spec(self, name, *_):
        if name == "dither.cli.screen":
            {STOP}
sys.meta_path.insert(0, Finder())
"""
AT_EXIT = f"import atexit; atexit.register(lambda: exec({STOP!r}))"


def test_while_modules_load() -> None:
    ended = run(WHILE_LOADING, "types")
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_after_the_command_has_ended() -> None:
    ended = run(AT_EXIT, "types", "--json")
    assert ended.returncode == -signal.SIGINT and ended.stderr == ""


@pytest.mark.parametrize("script", [WHILE_LOADING, AT_EXIT])
def test_where_a_shell_had_it_ignored_it_stays_ignored(script: str) -> None:
    ended = run(script, "types", "--json", ignored=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_before_a_command_begins_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dither.cli.convert.stop_on_error", stop)
    ended = CliRunner().invoke(app, ["convert", "model", str(tmp_path / "a.gguf")])
    assert (ended.exit_code, ended.stdout, ended.stderr.strip()) == (130, "", "interrupted")
