"""What others build on: the public names, the command line's flags, the doctests."""

from __future__ import annotations

import doctest
import inspect as python_inspect

import dither
from dither import units
from dither.cli import screen


def test_the_public_names_are_these() -> None:
    assert dither.__all__ == [
        "DitherError", "Inspection", "Plan", "Result", "__version__", "codec", "inspect", "open_model",
        "preset_names", "preview", "quantize",
    ]  # fmt: skip
    for name in dither.__all__:
        assert getattr(dither, name) is not None
        if name != "__version__":
            assert python_inspect.getdoc(getattr(dither, name)), f"{name} has no docstring"


def test_the_flags_of_quantize_are_these() -> None:
    from typer.main import get_command

    from dither.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == ["chat", "demo", "doctor", "inspect", "quantise", "quantize", "types"]
    options = {option for parameter in commands["quantize"].params for option in parameter.opts}
    assert options == {
        "model", "--to", "-o", "--output", "--imatrix", "--tensor", "--output-type", "--embedding-type",
        "--pure", "--pre", "--threads", "--dry-run", "--force", "--json",
    }  # fmt: skip


def test_doctests_of_units() -> None:
    assert doctest.testmod(units).failed == 0
    assert doctest.testmod(units).attempted >= 4
    assert doctest.testmod(screen) == (0, 1)
