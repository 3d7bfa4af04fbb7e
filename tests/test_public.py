"""What others build on: the public names, the command line's flags, the doctests."""

from __future__ import annotations

import doctest
import inspect as python_inspect

import dither
from dither import units
from dither.cli import screen


def test_the_public_names_are_these() -> None:
    assert dither.__all__ == [
        "Budget", "Calibration", "Converted", "DitherError", "EvidenceStore", "Fit", "Inspection",
        "Measurement", "Plan", "Planned", "Report", "Result", "Runs", "__version__", "answers", "budget",
        "calibrate", "codec", "convert",
        "fit", "inspect", "ladder", "load", "measure", "open_model", "plan", "preset_names", "preview",
        "quantize", "quantize_within", "report", "runs",
    ]  # fmt: skip
    for name in dither.__all__:
        assert getattr(dither, name) is not None
        if name != "__version__":
            assert python_inspect.getdoc(getattr(dither, name)), f"{name} has no docstring"


def test_the_flags_of_quantize_are_these() -> None:
    from typer.main import get_command

    from dither.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == [
        "answers", "calibrate", "chat", "compare", "convert", "dashboard", "demo", "doctor", "fit", "inspect", "ladder",
        "measure", "plan", "quantise", "quantize", "report", "types",
    ]  # fmt: skip
    options = {option for parameter in commands["quantize"].params for option in parameter.opts}
    assert options == {
        "model", "--to", "-o", "--output", "--evidence", "--imatrix", "--solver", "--transform",
        "--statistics", "--measure", "--measure-data", "--tensor", "--output-type", "--embedding-type",
        "--pure", "--pre", "--threads", "--device", "--dry-run", "--force", "--json", "--size", "--bpw",
        "--memory", "-c", "--context", "--kv", "--slots", "--max-kld", "--plan", "--types", "--no-validate",
        "--bits", "--group", "--sym", "--act-order",
    }  # fmt: skip


def test_doctests_of_units() -> None:
    assert doctest.testmod(units).failed == 0
    assert doctest.testmod(units).attempted >= 4
    assert doctest.testmod(screen) == (0, 1)
