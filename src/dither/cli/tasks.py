"""`dither tasks`: benchmarks of knowledge and reasoning, and what quantization took of the score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dither.cli.screen import Meter, out, plain, print_json, print_notes, stop_on_error, table
from dither.units import counted

if TYPE_CHECKING:
    from dither.running.tasks import Score, Scores


def tasks(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF, a checkpoint, a packed folder.")],
    names: Annotated[
        str, typer.Option("--tasks", metavar="NAME,…", help="Tasks of lm-evaluation-harness: arc_easy,hellaswag.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="The original: shows the difference to it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Your own task files, with their data beside them.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    context: Annotated[int | None, typer.Option("-c", "--context", min=2, help="Tokens; up to 4096.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score a model on benchmark tasks, beside its original.

    The tasks are those of lm-evaluation-harness, or your own.
    """
    with stop_on_error(as_json):
        from dither.running import tasks as job

        with Meter(quiet=as_json) as meter:
            found = job.tasks(
                file,
                [name.strip() for name in names.split(",") if name.strip()],
                against=against,
                limit=limit,
                data=data,
                fewshot=fewshot,
                chat=chat,
                context=context,
                device=device,
                progress=meter,
            )
        print_json(found.to_json()) if as_json else show(found)


def show(found: Scores) -> None:
    print_notes(found.notes)
    shown = table("task")
    for heading in ["metric", "score", *(["original", "difference"] if found.against else [])]:
        shown.add_column(heading, justify="left" if heading == "metric" else "right")
    for score in found.scores:
        beside = [_number(score.against), _apart(score)] if found.against else []
        kind = "" if score.filter == "none" else f" ({score.filter})"
        value = _number(score.value) + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
        shown.add_row(plain(score.task), plain(score.metric + kind), value, *beside)
    out.print(shown)
    asked = counted(max((score.questions for score in found.scores), default=0), "question")
    out.print(f"\n± is one standard error; {asked}{' of each task at most' if found.limit else ''}.")
    if found.against:
        out.print("The difference is taken question by question; * is larger than chance makes it one time in twenty.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _apart(score: Score) -> str:
    apart = score.difference
    return f"{apart.value:+.4f} ± {apart.stderr:.4f}{'*' if apart.told else ''}" if apart else "–"


COMMANDS = {160: tasks}
