"""`dither chat`: talk to a GGUF in the terminal.

The model's words go to stdout and nothing else does, so that they can be piped; greetings, statistics
and errors go to stderr.  Whatever the model writes is made harmless first: a terminal obeys escape
sequences, and a model can be made to write them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.screen import err, plain, print_json, stop_on_error
from dither.errors import DitherError, UsageError

if TYPE_CHECKING:
    from dither.engines.llamacpp import Generation, LlamaCpp

HELP = """\
/clear   forget the conversation (and keep the system text)
/help    this list
/quit    leave, as Ctrl-D does
Ctrl-C stops an answer."""

_VISIBLE = {code: 0x2400 + code for code in range(0x20)}  # ESC is shown as ␛, and so on
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # direction overrides
for _code in map(ord, "\n\t"):
    del _VISIBLE[_code]


def harmless(text: str) -> str:
    """Text whose control characters are shown instead of obeyed; newlines and tabs stay.

    >>> harmless("\\x1b[2Jhi\\r\\n")
    '␛[2Jhi␍\\n'
    """
    return text.translate(_VISIBLE)


def chat(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF to talk to.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this, print the answer and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system text: who the model is.")] = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer, in tokens.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("-t", "--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 0.8,
    context: Annotated[
        int, typer.Option("-c", "--context", min=0, help="Tokens remembered; 0 is up to 4096.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the answer repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document; needs a prompt.")] = False,
) -> None:
    """Talk to a model, or let a base model continue your text."""
    with stop_on_error(as_json):
        if prompt is None and not sys.stdin.isatty():
            prompt = _piped()
        if prompt is None and as_json:
            raise UsageError("--json", "needs one prompt", "Give it with -p or on standard input.")
        sampling = _Sampling(max_tokens, temperature, _drawn() if seed is None else seed)
        with _loaded(file, context, threads) as engine:
            talk = _conversation(engine, system, sampling)
            if prompt is None:
                _converse(talk)
            else:
                _once(talk, prompt, as_json)


def _drawn() -> int:
    import secrets

    return secrets.randbits(31)


@dataclass(frozen=True)
class _Sampling:
    max_tokens: int
    temperature: float
    seed: int

    def options(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}


@dataclass
class Conversation:
    """What was said so far.  A model with a chat template answers messages; one without is given
    all the text so far and continues it."""

    engine: LlamaCpp
    sampling: _Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        self.clear()

    @property
    def templated(self) -> bool:
        return self.engine.has_chat_template

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.text = ""

    def say(self, line: str) -> Generation:
        """The model's reply to `line`, to be handed to `heard` once it has been read."""
        if self.templated:
            asked = [*self.messages, {"role": "user", "content": line}]
            return self.engine.chat(asked, **self.sampling.options())
        return self.engine.generate(self.text + line, reuse=True, **self.sampling.options())

    def heard(self, line: str, answer: str) -> None:
        said = [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        self.messages.extend(said)
        self.text += line + answer


@contextmanager
def _loaded(file: Path, context: int, threads: int | None) -> Iterator[LlamaCpp]:
    from dither.engines.llamacpp import LlamaCpp

    with err.status(f"loading {plain(file.name)}"):
        engine = LlamaCpp(file, context=context, threads=threads, gpu_layers=-1)
    with engine:
        yield engine


def _piped() -> str:
    text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise UsageError("standard input", "is empty and no terminal", "Give a prompt with -p.")
    return text


def _conversation(engine: LlamaCpp, system: str | None, sampling: _Sampling) -> Conversation:
    if not engine.has_chat_template:
        if system:
            raise UsageError(
                "--system", "this file has no chat template to put it in", "Write it into the prompt itself."
            )
        err.print(
            f"{plain(engine.path.name)} has no chat template: a base model, "
            "it continues your text instead of answering."
        )
    return Conversation(engine, sampling, system)


def _once(talk: Conversation, prompt: str, as_json: bool) -> None:
    try:
        _answer_as_json(talk, prompt) if as_json else _answer(talk, prompt)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _answer(talk: Conversation, line: str) -> Generation:
    """Stream one reply to stdout, and remember it, whole or as far as Ctrl-C let it come."""
    reply = talk.say(line)
    answer = ""
    try:
        for piece in reply:
            answer += piece
            sys.stdout.write(harmless(piece))
            sys.stdout.flush()
    finally:
        reply.close()
        if answer:
            talk.heard(line, answer)
        if answer and not answer.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return reply


def _answer_as_json(talk: Conversation, line: str) -> None:
    reply = talk.say(line)
    answer = "".join(reply)
    print_json(
        {
            "model": str(talk.engine.path),
            "prompt": line,
            "answer": answer,
            "chat_template": talk.templated,
            "tokens": reply.tokens,
            "prompt_tokens": reply.prompt_tokens,
            "tokens_per_second": round(reply.tokens_per_second, 2),
            "stopped_by": reply.stopped_by,
            "temperature": talk.sampling.temperature,
            "seed": talk.sampling.seed,
        }
    )


def _converse(talk: Conversation) -> None:
    """Read lines until /quit or Ctrl-D."""
    err.print(
        f"{plain(talk.engine.path.name)}, context of {talk.engine.context} tokens. "
        "/help lists the commands, Ctrl-D leaves."
    )
    while True:
        try:
            line = _read_line()
            if line.strip() == "/quit":
                return
            _obey(talk, line) if line.strip().startswith("/") else _reply(talk, line)
        except EOFError:
            err.print()
            return
        except KeyboardInterrupt:
            err.print("\n/quit or Ctrl-D leaves")


def _obey(talk: Conversation, line: str) -> None:
    command = line.strip()
    if command == "/clear":
        talk.clear()
        err.print("forgotten")
    else:
        err.print(HELP if command == "/help" else f"{plain(command)} is no command\n{HELP}")


def _reply(talk: Conversation, line: str) -> None:
    if not line.strip() and talk.templated:
        return
    try:
        reply = _answer(talk, line)
    except KeyboardInterrupt:
        err.print("[dim]stopped[/]")
    except DitherError as error:
        err.print(f"[bold red]error:[/] {plain(error)} /clear starts anew.")
    else:
        err.print(f"[dim]{_account(reply, talk.sampling.max_tokens)}[/]")


def _account(reply: Generation, max_tokens: int) -> str:
    account = f"{reply.tokens} tokens, {reply.tokens_per_second:.1f} a second"
    if reply.stopped_by != "limit":
        return account
    if reply.tokens >= max_tokens:
        return f"{account}; cut off, -n allows more"
    return f"{account}; the context is full, /clear starts anew"


def _read_line() -> str:
    """A line from the person, with the line editing of the terminal where there is one."""
    if sys.stdout.isatty():
        import contextlib

        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 — importing it is what gives `input` its editing
        return input("> ")
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()
