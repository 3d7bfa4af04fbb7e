"""How much work a pattern or a schema would make llama.cpp, told before it sees it.

llama.cpp makes a grammar of a JSON schema, unrolls its repeats and follows every alternative at once, on
the one thread that serves all conversations of a model: `(a|b)?` a few hundred times over, or choices of
choices of choices, stop them all for good.  Both are bounded from the text: an element of a pattern counts
one, `?`, `*` and `+` double what they follow, `{m,n}` multiplies it; an `anyOf` has as many alternatives as
its parts have together.

Grammars in llama.cpp's own notation can hide as much in their rules; they are taken only by a server that
was told to.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

from dither.serving.errors import wrong

MOST_UNROLLED = 500  # elements of a pattern
MOST_CHOICES = 40  # of ? * + | in it, once unrolled
MOST_GROUPS = 50  # one inside another: llama.cpp reads them by recursion
MOST_PATTERN, MOST_GRAMMAR, MOST_SCHEMA = 500, 2**14, 2**15  # characters
MOST_ALTERNATIVES = 1000  # of a schema, at one place
_TOO_MUCH = "leaves so many choices that the model would be busy with it for good: bound its repeats and alternatives"
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\s*(\d*)\s*,?\s*(\d*)\s*\}|.", re.DOTALL)


def unrolled(pattern: str) -> tuple[int, int]:
    """Elements and choices of a regular expression once its repeats are written out.

    >>> unrolled("ab(c|d)?"), unrolled("[a-z]{3,9}"), unrolled("((a{0,99}){0,99}){0,99}")[0] > 10_000
    ((4, 2), (9, 0), True)
    """
    groups = [(0, 0)]
    last = (0, 0)
    for found in _TOKEN.finditer(pattern):
        token = found[0]
        if token == "(":
            groups.append((0, 0))
            more = last = (0, 0)
        elif token == ")" and len(groups) > 1:
            more = last = groups.pop()
        elif token.startswith("{") and len(token) > 1:
            times = max(int(found[1] or 0), int(found[2] or 0), 1) - 1
            more = (last[0] * times, last[1] * times)
            last = _sum(last, more)
        elif token in ("?", "*", "+", "|"):
            more = (0, 1)
            last = _sum(last, more) if token != "|" else last
        else:
            more = last = (1, 0)
        groups[-1] = _sum(groups[-1], more)
        if len(groups) > MOST_GROUPS or max(groups)[0] > 10**6:
            return 10**6, 10**6
    return reduce(_sum, groups)


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str) or len(pattern) > MOST_PATTERN:
        raise wrong(f"holds a pattern of more than {MOST_PATTERN} characters")
    elements, choices = unrolled(pattern)
    if elements > MOST_UNROLLED or choices > MOST_CHOICES:
        raise wrong(_TOO_MUCH)


def check_schema(schema: dict[str, Any]) -> None:
    """Bounds the patterns and the alternatives of a schema; its size and depth are bounded already."""
    counted: dict[int, int] = {}
    places: list[Any] = [schema]
    while places:
        place = places.pop()
        if isinstance(place, dict):
            if "pattern" in place and not isinstance(place["pattern"], dict):
                check_pattern(place["pattern"])
            if _alternatives(place, schema, counted) > MOST_ALTERNATIVES:
                raise wrong(_TOO_MUCH)
        places += place.values() if isinstance(place, dict) else place if isinstance(place, list) else ()


def _alternatives(place: Any, root: dict[str, Any], counted: dict[int, int], depth: int = 0) -> int:
    """What may begin at one place.  A reference that leads back to itself counts one: it is refused later."""
    if not isinstance(place, dict) or depth > 500:
        return 1 if depth <= 500 else 10**9
    if id(place) not in counted:
        counted[id(place)] = 1
        parts = [part for key in ("anyOf", "oneOf", "allOf") for part in _list(place.get(key))]
        if isinstance(place.get("$ref"), str):
            parts.append(_resolved(place["$ref"], root))
        below = sum(_alternatives(part, root, counted, depth + 1) for part in parts)
        counted[id(place)] = max(1, below + len(_list(place.get("enum"))))
    return counted[id(place)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolved(reference: str, root: dict[str, Any]) -> Any:
    place: Any = root
    for name in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        place = place.get(name) if isinstance(place, dict) else None
    return place


def check_grammar(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_GRAMMAR:
        raise wrong(f"must be a text of at most {MOST_GRAMMAR} characters")
    return value
