"""Keyword arguments that several functions share (PEP 692), which type checkers know and Python does not check."""

from __future__ import annotations

from collections.abc import Container, Iterable


def refuse_unknown(function: str, given: Iterable[str], known: Container[str]) -> None:
    """Raises the TypeError that Python itself would raise, had the function declared them one by one."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
