"""The README's blocks run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # real processes or engines: `make test` runs it, `make check` does not

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_session_and_the_python_block(tmp_path: Path) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    consoles, (python,) = blocks("console"), blocks("python")
    assert len(consoles) == 5
    for line in "".join(consoles).splitlines():
        _, *words = shlex.split(line.removeprefix("$ "))
        done = subprocess.run(
            [sys.executable, "-m", "dither", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "80"},
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip()
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"4\.\d\d bits per weight, relative error \d+\.\d%\n\{'", done.stdout)


def test_its_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_two_commands_are_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = re.findall(r"^make (\w+)", blocks("sh")[0], flags=re.MULTILINE)
    assert set(commands) <= set(targets)
    assert commands == ["demo", "test"]


def test_the_speed_page_shows_the_kept_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import render

    assert render.PAGE.read_text() == render.page()


def test_the_page_of_gpu_formats_shows_the_kept_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import render_gpu

    assert render_gpu.PAGE.read_text() == render_gpu.page()


def test_the_quality_page_shows_the_kept_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import render_quality

    assert render_quality.PAGE.read_text() == render_quality.page()
