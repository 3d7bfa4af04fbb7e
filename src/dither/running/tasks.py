"""Benchmarks of knowledge and reasoning: a file's score, and what quantization cost of it.

open both → the harness asks each the same questions → scores, and their difference question by question
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dither.capacity.machine import system_memory
from dither.errors import SourceError, UsageError
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.running.paired_difference import Difference, difference, standard_error

CONTEXT = 4096  # tokens at most; less if the model was trained on less


@dataclass(frozen=True)
class Score:
    """One metric of one task: `value` ± `stderr` (None if the harness gives none)."""

    task: str
    metric: str  # "acc", "acc_norm", "exact_match"
    filter: str
    value: float
    stderr: float | None
    questions: int
    against: float | None = None  # the other model's value
    difference: Difference | None = None  # the file's score minus the other's, on the same questions


@dataclass(frozen=True)
class Scores:
    """All scores of a file, and notes."""

    file: str
    against: str
    scores: tuple[Score, ...]
    limit: int | None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "against": self.against,
            "limit": self.limit,
            "notes": list(self.notes),
            "scores": [_flat(score) for score in self.scores],
        }


def _flat(score: Score) -> dict[str, Any]:
    apart = score.difference
    own = {key: value for key, value in score.__dict__.items() if key != "difference"}
    return own | {
        "difference": None if apart is None else apart.value,
        "difference_stderr": None if apart is None else apart.stderr,
        "changed": None if apart is None else apart.changed,
    }


def tasks(
    file: str | Path,
    names: Sequence[str],
    *,
    against: str | Path | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    context: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Scores:
    """Scores of a model (a GGUF, a checkpoint, a packed folder) on lm-evaluation-harness's tasks.

    `against` is asked the same questions, and every difference comes with its paired standard error.  `limit` is
    how many questions of each task are asked, the first ones; `data` is a folder of task files with their data;
    `chat` asks through the model's chat template.

    Raises UsageError if the harness is missing or has no such task, SourceError if a task's data or a model
    cannot be read, UnsupportedError for a folder in a task that lets the model write.
    """
    report = progress or Silent()
    if not names:
        raise UsageError("--tasks", "names no task", "Name some: --tasks arc_easy,hellaswag.")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit}", "leaves no question", "Give 1 or more.")
    folder = Path(data).resolve() if data is not None else None
    if folder is not None and not folder.is_dir():
        raise SourceError(str(data), "is no folder", "Name one that holds task files (.yaml) and their data.")
    asked = {"limit": limit, "data": folder, "fewshot": fewshot, "chat": chat}
    found, notes = _evaluated(file, names, asked, context, device, report)
    other, more = (None, []) if against is None else _evaluated(against, names, asked, context, device, report)
    notes += [line for line in more if line not in notes]
    return Scores(str(file), str(against or ""), tuple(_scores(found, other)), limit, tuple(notes))


def _evaluated(
    path: str | Path, names: Sequence[str], asked: Mapping[str, Any], context: int | None, device: str, report: Progress
) -> tuple[dict[str, Any], list[str]]:
    from dither.running.harness import Answers, evaluate
    from dither.running.likelihood import Likelihood

    model = open_model(Path(path).resolve() if Path(path).exists() else path)  # the working folder changes
    _, free = system_memory()
    likelihood = Likelihood(model, device=device, keep=(free or 0) // 2, progress=report)
    size = min(context or CONTEXT, likelihood.context)
    with closing(Answers(model, likelihood, size)) as answers:
        return evaluate(answers, names, **asked), [*model.notes, *likelihood.notes]


def _scores(found: Mapping[str, Any], other: Mapping[str, Any] | None) -> list[Score]:
    scores = []
    theirs = other or {"results": {}, "samples": {}}
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            ours = _by_question(found, task, metric, kind)
            beside = theirs["results"].get(task, {}).get(key)
            apart = difference(ours, _by_question(theirs, task, metric, kind))
            error = float(error) if known else standard_error(ours.values())
            beside = None if beside is None else float(beside)
            scores.append(Score(task, metric, kind, float(value), error, len(ours), beside, apart))
    return scores


def _by_question(found: Mapping[str, Any], task: str, metric: str, kind: str) -> dict[object, float]:
    """A metric's value for each question; empty if it is not a mean over questions, as perplexity is not."""
    return {
        row["doc_id"]: float(row[metric])
        for row in found["samples"].get(task, [])
        if row.get("filter", kind) == kind and isinstance(row.get(metric), int | float)
    }
