"""The words of the field, from `texts/glossary.toml`: each in one paragraph that a newcomer understands.

The page links the first use of a term in its explanations to its paragraph.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from dither.reporting import texts

_FILE = "glossary.toml"


class Term(texts.Entry):
    """`aliases` are other spellings that are linked too, `view` the section of the page that shows it."""

    term: str
    aliases: tuple[str, ...] = ()
    view: str
    text: texts.Prose


class Glossary(texts.Entry):
    terms: tuple[Term, ...]


@cache
def glossary() -> list[dict[str, Any]]:
    """The terms as the results document has them, in the order of the alphabet.  Raises FormatError, naming the entry,
    where a word leads to two places."""
    found = sorted(texts.load(_FILE, Glossary).terms, key=lambda entry: entry.term.lower())
    places: dict[str, str] = {}
    for entry in found:
        for word in (entry.term, *entry.aliases):
            if places.setdefault(word.lower(), entry.term) != entry.term:
                raise texts.wrong(_FILE, f"in the entry {entry.term!r}, {word!r} leads to two paragraphs")
    return [{"id": term_id(entry.term), **entry.model_dump(mode="json")} for entry in found]


def term_id(term: str) -> str:
    """The anchor of a term on the page, as the page's `glossaryId` makes it.

    >>> term_id("KL divergence"), term_id("K-quant")
    ('term-kl-divergence', 'term-k-quant')
    """
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")
