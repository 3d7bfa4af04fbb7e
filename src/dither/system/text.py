"""Texts of strangers, safe to print: names, keys and messages out of files that somebody else wrote."""

from __future__ import annotations


def shown(name: str, limit: int = 120) -> str:
    """A name from an untrusted file, safe to print: control characters escaped, length bounded.

    >>> shown("blk.0.attn_q.weight"), shown("a\\x1b[2J")
    ('blk.0.attn_q.weight', 'a\\\\x1b[2J')
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: limit + 1])
    return text if len(name) <= limit else text[:limit] + "…"
