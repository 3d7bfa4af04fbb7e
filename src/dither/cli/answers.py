"""`dither answers`: a file and its original are asked the same, and their answers recorded for the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, copyable, err, out, plain, print_json, print_notes, stop_on_error

if TYPE_CHECKING:
    from dither.reporting.answer_records import Answer, Forced, Recorded


def answers(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The quantized file: a GGUF or a folder.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The original: a checkpoint, a GGUF, a hub id.")],
    prompt: Annotated[
        list[str] | None, typer.Option("-p", "--prompt", help="What to ask both; may be repeated.")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text both read: KL divergence by token.")] = None,
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Longest answer, in tokens.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the cores at hand.")] = None,
    device: Annotated[str, typer.Option(help="Where to read --text: cpu, cuda, …")] = "cpu",
    no_save: Annotated[bool, typer.Option("--no-save", help="Write no FILE.answers.json.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Record what a file and its original answer, side by side."""
    with stop_on_error(as_json):
        from dither.reporting import answers as job

        with Meter() as meter:
            found = job.answers(
                file,
                against,
                prompts=prompt or job.PROMPTS,
                text=None if text is None else _read(text),
                max_tokens=tokens,
                threads=threads,
                device=device,
                save=not no_save,
                progress=meter,
            )
        print_json(found.to_json()) if as_json else show(found)
        if not no_save and not as_json:
            err.print(f"Kept beside the file. See them:  {copyable('dither', 'dashboard', file)}", soft_wrap=True)


def _read(path: Path) -> str:
    """The beginning of the file, as much as is used.  Raises SourceError if it cannot be read as text."""
    from dither.errors import SourceError
    from dither.reporting.answer_records import LONGEST_TEXT

    try:
        with path.open(encoding="utf-8") as file:
            return file.read(LONGEST_TEXT)
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Name a text file.") from None
    except UnicodeDecodeError:
        raise SourceError(str(path), "is not UTF-8 text", "Convert it: iconv -t UTF-8 FILE.") from None


def show(found: Recorded) -> None:
    print_notes(found.notes)
    for answer in found.answers:
        _show_answer(answer)
    for forced in found.forced:
        _show_forced(forced)


def _show_answer(answer: Answer) -> None:
    apart = answer.first_divergence
    out.print(f"[bold]{plain(_line(answer.prompt))}[/]", soft_wrap=True)
    for name, side in (("original", answer.original), ("quantized", answer.quantized)):
        at = len(side.tokens) if apart is None else apart
        same, other = (plain(_line("".join(part))) for part in (side.tokens[:at], side.tokens[at:]))
        out.print(f"  {name:9}  {same}{'[bold]▸[/]' if other else ''}{other}", soft_wrap=True)
    said = "Both answers are the same." if apart is None else f"They differ from token {apart + 1} on."
    out.print(f"  {said}\n")


def _show_forced(forced: Forced) -> None:
    scored = [token for token in forced.tokens if token.kl is not None]
    if not scored:
        return
    worst = max(scored, key=lambda token: token.kl or 0.0)
    mean = sum(token.kl or 0.0 for token in scored) / len(scored)
    same = sum(token.same_top for token in scored) / len(scored)
    out.print(
        f"Reading {len(scored)} tokens: mean KL divergence {mean:.4g}, the same token likeliest in "
        f"{100 * same:.1f} %; furthest apart before “{plain(_line(worst.text).strip())}” ({worst.kl:.3g})."
    )


def _line(text: str) -> str:
    return text.replace("\n", "⏎")


COMMANDS = {70: answers}
