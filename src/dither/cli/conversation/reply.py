"""One question and its answer, or two models' answers to it, on the terminal as they come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dither.cli.conversation.beside import growing, marked, summary
from dither.cli.harmless import harmless
from dither.cli.screen import err, out, plain
from dither.running.divergence import Divergence, diverge

if TYPE_CHECKING:
    from dither.engines.llamacpp import Generation
    from dither.running.conversation import Conversation


def answer(talk: Conversation, line: str) -> Generation:
    """Stream one reply to stdout, and remember it, whole or as far as Ctrl-C let it come."""
    reply = talk.say(line)
    said = ""
    try:
        with talk.accounted(reply):
            for piece in reply:
                said += piece
                sys.stdout.write(harmless(piece))
                sys.stdout.flush()
    finally:
        reply.close()
        if said:
            talk.turns.append((line, said))
        if said and not said.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return reply


def both(talks: Sequence[Conversation], line: str) -> Divergence:
    """Both replies: on a terminal in their columns as they come, else one after the other."""
    titles = [talk.engine.path.name for talk in talks]
    texts = ["", ""]
    if not out.is_terminal:
        for index, talk in enumerate(talks):
            err.print(f"[dim]{plain(titles[index])}:[/]")
            answer(talk, line)
            texts[index] = talk.turns[-1][1] if talk.turns else ""
        found = diverge(*texts)
        for told in summary(found):
            err.print(plain(told))
        return found
    with growing(titles) as show:
        show(texts)
        for index, talk in enumerate(talks):
            _listen(talk, line, texts, index, show)
        found = diverge(*texts)
        show(marked(found))
    for told in summary(found):
        out.print(plain(told), style="dim")
    return found


def _listen(talk: Conversation, line: str, texts: list[str], index: int, show: Any) -> None:
    reply = talk.say(line)
    try:
        with talk.accounted(reply):
            for piece in reply:
                texts[index] += piece
                show(texts)
    finally:
        reply.close()
        if texts[index]:
            talk.turns.append((line, texts[index]))
