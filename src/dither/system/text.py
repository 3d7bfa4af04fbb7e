"""Texts of strangers, safe to print: names, keys and messages out of files that somebody else wrote."""

from __future__ import annotations


def shown(name: str, limit: int = 120) -> str:
    """A name from an untrusted file, safe to print: control characters escaped, length bounded.

    >>> shown("blk.0.attn_q.weight"), shown("a\\x1b[2J")
    ('blk.0.attn_q.weight', 'a\\\\x1b[2J')
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: limit + 1])
    return text if len(name) <= limit else text[:limit] + "…"


def printable(value: object, instead: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Any text with `instead` for every character that is not to be printed: one line, and as long as it was.

    >>> printable("a\x1b[2J|b\n"), printable("a\nb", " ")
    ('a�[2J|b�', 'a b')
    """
    return "".join(c if c.isprintable() else instead for c in str(value))
