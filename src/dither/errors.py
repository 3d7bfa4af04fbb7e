"""Every error Dither raises on purpose.

    DitherError            anything that stops the work (the command line exits with 1)
    ├── UsageError         the request itself makes no sense (exits with 2)
    ├── SourceError        a model that cannot be read: missing, unsafe, inconsistent
    │   ├── FormatError    a file whose bytes contradict themselves or its own size
    │   └── UnreadableError  a file that the system cannot read now, and may be able to later
    ├── UnsupportedError   well-formed, but nothing here knows how to handle it
    └── OutputError        the result cannot be written: disk, permissions, a clash of names

An error names the thing, the reason and the way out, in that order.
"""

from __future__ import annotations


class DitherError(Exception):
    """`thing: reason. way_out` — each part is kept, so that `--json` can print them apart."""

    exit_code = 1

    def __init__(self, thing: str, reason: str, way_out: str = "") -> None:
        self.thing, self.reason, self.way_out = thing, reason, way_out
        sentence = f"{thing}: {reason}".rstrip(".") + "."
        super().__init__(f"{sentence} {way_out}".rstrip())

    def to_json(self) -> dict[str, str]:
        return {"thing": self.thing, "reason": self.reason, "way_out": self.way_out}


class UsageError(DitherError):
    exit_code = 2


class SourceError(DitherError):
    pass


class FormatError(SourceError):
    pass


class UnreadableError(SourceError):
    pass


class UnsupportedError(DitherError):
    pass


class OutputError(DitherError):
    pass
