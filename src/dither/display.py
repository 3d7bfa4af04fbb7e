"""How results show themselves in a notebook: a table of HTML, every text in it escaped.

Notebooks ask an object for `_repr_html_`.  What a result holds comes from files of strangers as often as not,
so nothing gets into the page but through `escape`.  Style is the notebook's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as _escape

from dither.system.text import printable

_MOST = 400  # characters of one cell


def escape(value: object) -> str:
    """
    >>> escape('<b onclick="x()">Q4_K</b>')
    '&lt;b onclick=&quot;x()&quot;&gt;Q4_K&lt;/b&gt;'
    """
    text = printable(str(value)[: _MOST + 1])
    return _escape(text if len(text) <= _MOST else text[:_MOST] + "…")


def pairs(title: object, rows: Iterable[tuple[str, object]], notes: Iterable[object] = ()) -> str:
    """A table of names and values under a title, and sentences below it."""
    body = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return _table(title, "", body, notes)


def table(title: object, heads: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[object] = ()) -> str:
    """A table with named columns under a title, and sentences below it."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return _table(title, f"<thead><tr>{top}</tr></thead>", body, notes)


def _table(title: object, head: str, body: str, notes: Iterable[object]) -> str:
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><caption>{escape(title)}</caption>{head}<tbody>{body}</tbody></table>{below}"


def interval(value: float, low: float | None, high: float | None, form: str = ".3g") -> str:
    """
    >>> interval(0.0312, 0.03, 0.0323), interval(1.5, None, None)
    ('0.0312 (95 %: 0.03 to 0.0323)', '1.5')
    """
    if low is None or high is None:
        return format(value, form)
    return f"{value:{form}} (95 %: {low:{form}} to {high:{form}})"
