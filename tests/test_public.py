"""What others build on: the public names, the command line's flags, the doctests."""

from __future__ import annotations

import doctest
import inspect as python_inspect

import dither
from dither import units
from dither.cli import harmless, screen
from dither.running import benchmark, divergence, link_or_copy, paired_difference


def test_the_public_names_are_these() -> None:
    assert dither.__all__ == [
        "Benchmark",
        "Budget",
        "Calibration",
        "Converted",
        "DitherError",
        "EvidenceStore",
        "Exported",
        "Fit",
        "Inspection",
        "Measurement",
        "Mix",
        "Plan",
        "Planned",
        "Report",
        "Result",
        "Runs",
        "Scores",
        "Server",
        "__version__",
        "answers",
        "bench",
        "budget",
        "calibrate",
        "codec",
        "convert",
        "export",
        "fit",
        "inspect",
        "ladder",
        "load",
        "measure",
        "open_model",
        "plan",
        "preset_names",
        "preview",
        "quantize",
        "quantize_within",
        "report",
        "runs",
        "serve",
        "tasks",
    ]
    for name in dither.__all__:
        assert getattr(dither, name) is not None
        if name != "__version__":
            assert python_inspect.getdoc(getattr(dither, name)), f"{name} has no docstring"


def test_the_flags_of_quantize_are_these() -> None:
    from typer.main import get_command

    from dither.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == [
        "answers",
        "bench",
        "calibrate",
        "chat",
        "compare",
        "convert",
        "dashboard",
        "demo",
        "doctor",
        "export",
        "fit",
        "inspect",
        "ladder",
        "measure",
        "plan",
        "quantise",
        "quantize",
        "report",
        "serve",
        "tasks",
        "types",
    ]
    options = {option for parameter in commands["quantize"].params for option in parameter.opts}
    assert options == {
        "model",
        "--to",
        "-o",
        "--output",
        "--evidence",
        "--imatrix",
        "--solver",
        "--transform",
        "--statistics",
        "--measure",
        "--measure-data",
        "--tensor",
        "--output-type",
        "--embedding-type",
        "--pure",
        "--pre",
        "--threads",
        "--max-memory",
        "--device",
        "--dry-run",
        "--force",
        "--json",
        "--size",
        "--bpw",
        "--check",
        "--memory",
        "-c",
        "--context",
        "--kv",
        "--slots",
        "--max-kld",
        "--plan",
        "--types",
        "--no-validate",
        "--bits",
        "--group",
        "--sym",
        "--act-order",
    }


def test_the_flags_of_running_are_these() -> None:
    from typer.main import get_command

    from dither.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]

    def flags(name: str) -> set[str]:
        return {option for parameter in commands[name].params for option in parameter.opts if "-" in option}

    assert flags("bench") == {
        "--against",
        "--threads",
        "-c",
        "--context",
        "-p",
        "--prompt",
        "-n",
        "--generate",
        "-r",
        "--repeats",
        "--no-save",
        "--json",
    }
    assert flags("chat") == {
        "--against",
        "-p",
        "--prompt",
        "--system",
        "-n",
        "--max-tokens",
        "-t",
        "--temperature",
        "-c",
        "--context",
        "--threads",
        "--seed",
        "--json",
    }
    assert flags("tasks") == {
        "--tasks",
        "--against",
        "--limit",
        "--data",
        "--fewshot",
        "--chat",
        "-c",
        "--context",
        "--device",
        "--json",
    }
    assert flags("export") == {
        "--ollama",
        "--lmstudio",
        "--hf",
        "--yes",
        "--private",
        "--shard",
        "--publisher",
        "-c",
        "--context",
        "--json",
    }


def test_the_command_line_starts_without_torch_and_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, dither.cli; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_doctests_of_units() -> None:
    assert doctest.testmod(units).failed == 0
    assert doctest.testmod(units).attempted >= 4
    assert doctest.testmod(screen) == (0, 1)
    for module in (benchmark, divergence, link_or_copy, paired_difference, harmless):
        assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted
