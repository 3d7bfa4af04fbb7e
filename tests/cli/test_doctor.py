"""`dither doctor` against what psutil, the system and the installed packages say themselves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from dither.cli import app
from dither.cli.screen import out

examined = sys.modules["dither.cli.doctor"]


def report(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def findings() -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(report("--json"))["findings"]}


def test_the_machine_is_the_one_psutil_sees(findings: dict[str, dict[str, Any]]) -> None:
    assert findings["Python"]["data"]["version"] == platform.python_version()
    assert findings["CPU"]["data"]["logical"] == psutil.cpu_count()
    assert 1 <= findings["CPU"]["data"]["cores"] <= psutil.cpu_count()
    assert 0 < findings["memory"]["data"]["total"] <= psutil.virtual_memory().total
    free = psutil.disk_usage(str(Path.cwd())).free
    assert findings["disk"]["data"]["free"] == pytest.approx(free, rel=0.02)


@pytest.mark.parametrize("package", ["numba", "libgguf", "huggingface_hub", "torch", "transformers"])
def test_versions_are_those_installed(findings: dict[str, dict[str, Any]], package: str) -> None:
    assert findings[package]["found"] == metadata.version(package)
    assert findings[package]["state"] == "ok"


def test_llama_cpp_is_really_loaded(findings: dict[str, dict[str, Any]]) -> None:
    assert findings["llama.cpp"]["data"]["version"] == metadata.version("xllamacpp")
    assert "CPU" in findings["llama.cpp"]["data"]["devices"]


def test_the_kernel_cache_is_a_folder_numba_writes(findings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert os.access(findings["kernel cache"]["data"]["path"], os.W_OK)


def test_the_kernel_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    assert examined._kernel_cache().data["path"] == str(tmp_path / "kernels")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    blocked = examined._kernel_cache()
    assert blocked.state == "missing" and "NUMBA_CACHE_DIR" in blocked.note


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examined._PACKAGES, "dither-no-such-package", (True, "does nothing"))
    text = " ".join(report().split())
    assert "pip install dither-no-such-package" in text
    assert text.endswith("Missing: dither-no-such-package.")


@pytest.mark.parametrize(
    ("script", "shown", "state"),
    [
        ("echo 'NVIDIA H200, 143771, 570.86, 9.0'", "NVIDIA H200, 140 GiB", "ok"),
        ("echo 'Tesla, [N/A], 1, 7.5'", "Tesla", "ok"),
        ("echo driver mismatch >&2; exit 9", "nvidia-smi does not answer", "missing"),
    ],
)
def test_nvidia_cards_are_read_from_nvidia_smi(
    script: str, shown: str, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (card,) = examined._nvidia()
    assert (card.found, card.state) == (shown, state)


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = report("--json")
    assert "hf_secret" not in text and "offline, a token" in text


def test_it_reads_well_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "_width", 80)
    lines = report().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("Python" in line and platform.python_version() in line for line in lines)
    assert lines[-1] == "Nothing is missing."


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dither.cli.doctor import examine; list(examine());"
        "print({'torch', 'transformers', 'numba', 'vllm'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
