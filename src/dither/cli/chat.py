"""`dither chat`: talk to a GGUF in the terminal, or to two of them at once.

The model's words go to stdout and nothing else does, so that they can be piped; greetings, statistics
and errors go to stderr.  Whatever the model writes is made harmless first (`cli.harmless`).

With `--against`, both models get the same questions, each with its own answers remembered, one after the
other: two that compute at once would share the cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dither.cli.screen import err, plain, print_json, stop_on_error
from dither.errors import UsageError

if TYPE_CHECKING:
    from dither.running.conversation import Conversation, Sampling, Seat


def chat(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF to talk to.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A second GGUF; both answers are shown side by side.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Ask this, print the answer and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "-t", "--temperature", min=0.0, help="0 always takes the likeliest token. Default: 0.8; 0 with --against."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option("-c", "--context", min=0, help="Tokens of context; 0: the model's, at most 4096.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: the physical cores.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the random choices: the same seed gives the same answer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document; needs a prompt.")] = False,
) -> None:
    """Talk to a model, or let a base model continue your text."""
    with stop_on_error(as_json):
        if prompt is None and not sys.stdin.isatty():
            prompt = _piped()
        if prompt is None and as_json:
            raise UsageError("--json", "needs one prompt", "Give it with -p or on standard input.")
        import secrets

        from dither.running.conversation import Sampling, Seat

        # Two models are compared by what they hold likeliest, unless dice are asked for.
        warmth = temperature if temperature is not None else 0.8 if against is None else 0.0
        sampling = Sampling(max_tokens, warmth, secrets.randbits(31) if seed is None else seed)
        with ExitStack() as stack:
            seats = []
            for each in [file, *([against] if against is not None else [])]:
                with err.status(f"loading {plain(each.name)}"):
                    seats.append(stack.enter_context(Seat(each, context=context, threads=threads)))
            talks = [_conversation(seat, system, sampling) for seat in seats]
            if prompt is not None:
                _once(talks, prompt, as_json)
                return
            from dither.cli.conversation.talk import converse

            converse(talks, seats)


def _piped() -> str:
    try:
        text = sys.stdin.buffer.read().decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("standard input", "is no UTF-8", "Write it as UTF-8: iconv does that.") from None
    if not text.strip():
        raise UsageError("standard input", "is empty, and there is no terminal to type in", "Give a prompt with -p.")
    return text


def _conversation(seat: Seat, system: str | None, sampling: Sampling) -> Conversation:
    from dither.running.conversation import Conversation

    engine = seat.engine
    if not engine.has_chat_template:
        if system:
            reason = "this file has no chat template to put it in"
            raise UsageError("--system", reason, "Write it into the prompt itself.")
        name = plain(engine.path.name)
        err.print(f"{name} has no chat template, so it is a base model: it continues your text instead of answering.")
    return Conversation(engine, sampling, system)


def _once(talks: Sequence[Conversation], prompt: str, as_json: bool) -> None:
    from dither.cli.conversation.reply import answer, both

    try:
        if as_json:
            print_json(_document(talks, prompt))
        elif len(talks) == 2:
            both(talks, prompt)
        else:
            answer(talks[0], prompt)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _document(talks: Sequence[Conversation], line: str) -> dict[str, Any]:
    from dither.running.divergence import diverge

    said, figures = _said(talks[0], line)
    document = {
        "model": str(talks[0].engine.path),
        "prompt": line,
        "answer": said,
        "chat_template": talks[0].engine.has_chat_template,
        **figures,
        "temperature": talks[0].sampling.temperature,
        "seed": talks[0].sampling.seed,
    }
    if len(talks) == 2:
        text, figures = _said(talks[1], line)
        found = diverge(said, text)
        document["against"] = {"model": str(talks[1].engine.path), "answer": text, **figures}
        document["divergence"] = {"character": found.character, "words": found.words, "shared": round(found.shared, 4)}
    return document


def _said(talk: Conversation, line: str) -> tuple[str, dict[str, Any]]:
    reply = talk.say(line)
    text, speed = "".join(reply), round(reply.tokens_per_second, 2)
    figures = {"tokens": reply.tokens, "prompt_tokens": reply.prompt_tokens, "tokens_per_second": speed}
    return text, {**figures, "stopped_by": reply.stopped_by}


COMMANDS = {120: chat}
