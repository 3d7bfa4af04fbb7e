"""Words of a model on a terminal: shown, never obeyed.

A terminal obeys escape sequences, and a model can be made to write them: clear the screen, rename the
window, type for the person on some.  Control characters are replaced by their pictures; so are the marks
that turn the direction of writing, which can make a text read as another.
"""

from __future__ import annotations

_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}  # ESC is shown as ␛, and so on
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # direction overrides


def harmless(text: str) -> str:
    """Text whose control characters are shown instead of obeyed; newlines and tabs stay.

    >>> harmless("\\x1b[2Jhi\\r\\n")
    '␛[2Jhi␍\\n'
    """
    return text.translate(_VISIBLE)
