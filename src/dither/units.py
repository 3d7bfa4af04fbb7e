"""Sizes, counts and durations as people write and read them.

Binary units (KiB, MiB, GiB) count memory and files; decimal ones (k, M, B) count parameters.
"""

from __future__ import annotations

import re

from dither.errors import UsageError

_FACTORS = {"": 1, "b": 1} | {
    letter + ending: int(base**power)
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_MOST = 2**60  # bytes, above any memory or file
_NO_SIZE = 2**16  # bytes; a text of fewer without a unit has its unit forgotten: no model is so small


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "file"), counted(3, "file")
    ('1 file', '3 files')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def parse_bytes(text: str | int, thing: str = "", least: int = 0) -> int:
    """Bytes in a size such as `4.2GiB`, `900MB` or `12345`; at least `least`.

    Raises UsageError, which calls the size `thing`, if the text is not a size, if it is below `least`, if it is
    larger than any memory, or if it is a small number without a unit.

    >>> parse_bytes("1.5 KiB"), parse_bytes("16GB")
    (1536, 16000000000)
    """
    name = f"{thing} {text}".strip() if thing else repr(text)
    way_out = "Write it like 4.2GiB, 900MB or 12345678."
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _FACTORS:
        raise UsageError(name, "is not a size", way_out)
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if size < least:
        raise UsageError(name, "is too little" if size >= 0 else "is negative", way_out)
    if size > _MOST:
        raise UsageError(name, "is more than any machine has", way_out)
    if isinstance(text, str) and 0 < size < _NO_SIZE and not match[2]:
        raise UsageError(name, "has no unit, and bytes would be next to nothing", f"Did you mean {match[1]}GiB?")
    return int(size)


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(999), format_bytes(4 * 2**20), format_bytes(98_362_432)
    ('999 B', '4.00 MiB', '93.8 MiB')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    if unit == "B":
        return f"{size:.0f} B"
    return f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"


def format_count(count: float) -> str:
    """
    >>> format_count(134_515_008), format_count(8.03e9), format_count(950)
    ('134.5 M', '8.0 B', '950')
    """
    for factor, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= factor:
            return f"{count / factor:.1f}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(0.42), format_seconds(75), format_seconds(7265)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
