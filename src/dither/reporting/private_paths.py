"""Texts that leave this machine: files keep their names and lose the folders they lie in.

Reasons, notes and commands were written for the person at this machine, and name files as they were typed.  In a
report or a card somebody else reads them, and `/home/ada/secret-project/a.gguf` tells more than it should.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_QUOTED = re.compile(r"""(['"])(?:~?/|[A-Za-z]:\\)([^'"\n]*)\1""")
_PLAIN = re.compile(r"""(?<![\w.:/\\~<-])(?:~?/|[A-Za-z]:\\)((?:[^\s/\\'"`:;,()]+[/\\])*)(?=[^\s/\\'"`:;,()])""")


def placeless(text: str, folders: Iterable[str] = ()) -> str:
    """`text` with absolute paths cut to their last part; `folders` are known ones, with any letters in them.

    >>> placeless("dither bench /home/ada/models/a.gguf '/home/ada/my models/b c.gguf' -r 3")
    "dither bench a.gguf 'b c.gguf' -r 3"
    >>> placeless("12 tokens/s; see https://example.org/a/b, ~/x/y.txt or C:\\\\work\\\\y.txt")
    '12 tokens/s; see https://example.org/a/b, y.txt or y.txt'
    >>> placeless("/my models/a.gguf: is no GGUF", ["/my models"])
    'a.gguf: is no GGUF'
    """
    for folder in sorted((name for name in folders if len(name) > 1), key=len, reverse=True):
        text = text.replace(f"{folder}/", "").replace(f"{folder}\\", "")
    text = _QUOTED.sub(lambda found: found[1] + re.split(r"[/\\]", found[2].rstrip("/\\"))[-1] + found[1], text)
    return _PLAIN.sub("", text)
