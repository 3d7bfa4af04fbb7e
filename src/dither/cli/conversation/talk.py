"""The conversation itself: lines are read and answered until the person leaves; lines with / are commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dither.cli.conversation.reply import answer, both
from dither.cli.harmless import harmless
from dither.cli.screen import err, plain
from dither.errors import DitherError, OutputError
from dither.running.memory import peak_bytes, resident_bytes
from dither.units import counted, format_bytes

if TYPE_CHECKING:
    from dither.engines.llamacpp import Generation
    from dither.running.conversation import Conversation, Seat

HELP = """\
/clear        forget the conversation, but keep the system prompt
/retry        answer the last line again, with other random choices
/switch TYPE  load another quantization of this model, beside it, or a FILE; keep the conversation
/stats        tokens, speed, memory, energy
/save [FILE]  write the conversation, as .md to read or .json to use
/help         show this list
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer."""


def converse(talks: Sequence[Conversation], seats: Sequence[Seat]) -> None:
    """Read lines until /quit or Ctrl-D."""
    first = talks[0].engine
    beside = f" beside {plain(talks[1].engine.path.name)}" if len(talks) == 2 else ""
    err.print(
        f"{plain(first.path.name)}{beside}, context of {first.context} tokens. /help lists the commands, Ctrl-D leaves."
    )
    while True:
        try:
            line = _read_line()
            if line.strip() == "/quit":
                return
            _obey(talks, seats, line.strip()) if line.strip().startswith("/") else _reply(talks, line)
        except EOFError:
            err.print()
            return
        except KeyboardInterrupt:
            err.print("\n/quit or Ctrl-D leaves")


def _obey(talks: Sequence[Conversation], seats: Sequence[Seat], command: str) -> None:
    word, _, rest = command.partition(" ")
    rest = rest.strip()
    try:
        if word == "/clear":
            for talk in talks:
                talk.turns.clear()
            err.print("forgotten")
        elif word == "/retry":
            _retry(talks)
        elif word == "/switch":
            _switch(talks[0], seats[0], rest)
        elif word == "/stats":
            for talk in talks:
                _stats(talk)
            err.print(f"memory {format_bytes(resident_bytes())} now, {format_bytes(peak_bytes())} at most")
        elif word == "/save":
            _save(talks, rest)
        else:
            err.print(HELP if word == "/help" else f"{plain(command)} is no command\n{HELP}")
    except DitherError as error:
        _tell(error)


def _tell(error: DitherError, more: str = "") -> None:
    err.print(f"[bold red]error:[/] {plain(error)}{more}")


def _reply(talks: Sequence[Conversation], line: str) -> None:
    if not line.strip() and talks[0].engine.has_chat_template:
        return
    try:
        if len(talks) == 2:
            both(talks, line)
            return
        reply = answer(talks[0], line)
    except KeyboardInterrupt:
        err.print("[dim]stopped[/]")
    except DitherError as error:
        _tell(error, " /clear starts again.")
    else:
        err.print(f"[dim]{_account(reply, talks[0].sampling.max_tokens)}[/]")


def _account(reply: Generation, max_tokens: int) -> str:
    account = f"{reply.tokens} tokens, {reply.tokens_per_second:.1f} a second"
    if reply.stopped_by != "limit":
        return account
    full = "the context is full, /clear starts again"
    return f"{account}; {'cut off, -n allows more' if reply.tokens >= max_tokens else full}"


def _retry(talks: Sequence[Conversation]) -> None:
    lines = [talk.take_back() for talk in talks]
    line = next((line for line in lines if line is not None), None)
    if line is None:
        err.print("nothing was asked yet")
        return
    if not talks[0].sampling.temperature:
        err.print("[dim]at temperature 0 the answer stays the same; -t 0.8 varies it[/]")
    _reply(talks, line)


def _switch(talk: Conversation, seat: Seat, wanted: str) -> None:
    from dither.running.siblings import find

    if not wanted:
        err.print("which? /switch Q8_0, or a file's name")
        return
    path = find(talk.engine.path, wanted)
    try:
        with err.status(f"loading {plain(path.name)}"):
            talk.engine = seat.switch(path)
    except DitherError:
        talk.engine = seat.engine  # the one from before, loaded again
        raise
    kept = f"; {counted(len(talk.turns), 'turn')} kept" if talk.turns else ""
    err.print(f"{plain(path.name)} answers now{kept}")


def _stats(talk: Conversation) -> None:
    spent = talk.spent
    mean = spent.tokens / spent.seconds if spent.seconds else 0.0
    energy = plain(talk.meter.note)
    if spent.joules is not None:
        energy = f"{spent.joules:.1f} J, {spent.joules / max(1, spent.tokens):.2f} J a token ({energy})"
    err.print(
        f"{plain(talk.engine.path.name)}: {spent.answers} answers, {spent.tokens} tokens; "
        f"{mean:.1f} a second, the last {spent.last_speed:.1f}\nenergy: {energy}"
    )


def _save(talks: Sequence[Conversation], name: str) -> None:
    """Into a new file: nothing is ever replaced."""
    import json

    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json"))
    if path.suffix == ".md":
        text = "\n".join(map(_readable, talks))
    else:  # one conversation a line: what `dither calibrate --data` reads
        text = "".join(json.dumps(talk.document(), ensure_ascii=False) + "\n" for talk in talks)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(str(path), "is there already", "Name another file.") from None
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})", "Name another file.") from None
    err.print(f"kept as {plain(path)}")


def _readable(talk: Conversation) -> str:
    said = (f"**{message['role']}:** {harmless(message['content'])}\n" for message in talk.messages)
    return "\n".join([f"# {talk.engine.path.name}\n", *said])


def _read_line() -> str:
    """A line from the person, with the line editing of the terminal where there is one."""
    if sys.stdout.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 — importing it is what gives `input` its editing and its history
        return input("> ")
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()
