"""Which runs can be compared: those measured on the same text, each under a name of its own.

A KL divergence on one text says nothing beside one on another, and the numbers of a file that has changed
since describe no file.  So every run of the document says whether it may be compared with the others, and what to
call it where two have the same type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from dither.reporting import frontier
from dither.reporting.document import RunRecord
from dither.units import format_bytes


def prepared(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs with `label`, `family` and `comparable` filled in."""
    names, alike = labels(runs), {run.id for run in comparable(runs)}
    return [
        run.model_copy(
            update={"label": names[run.id], "family": frontier.family_of(run), "comparable": run.id in alike}
        )
        for run in runs
    ]


def comparable(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of the text and the original that most were measured on (ties: the first); no stale ones.
    Where none was measured, those that were timed."""
    known = [run for run in runs if run.metrics and not run.stale]
    sound = [run for run in known if run.measured_on is not None] or known
    groups = Counter(_ground(run) for run in sound)
    if not groups:
        return []
    [(most, _)] = groups.most_common(1)  # of equals the first
    return [run for run in sound if _ground(run) == most]


def _ground(run: RunRecord) -> tuple[str, ...]:
    on = run.measured_on
    return (run.reference or "", on.sha256 or on.data, str(on.context), str(on.tokens)) if on else ("",)


def labels(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Id → what people call the file: its type, with the recipe, or its name, where types repeat."""
    types = Counter(run.type for run in runs)
    recipes = Counter((run.type, run.recipe) for run in runs)

    def called(run: RunRecord) -> str:
        if types[run.type] == 1:
            return run.type
        return f"{run.type} ({run.recipe})" if run.recipe and recipes[run.type, run.recipe] == 1 else run.file

    return {run.id: called(run) for run in runs}


def told_apart(points: Sequence[frontier.Point], best: frontier.Point) -> str:
    """A sentence where a smaller file is as good as far as its text tells: their intervals of KL overlap."""
    if best["high"] is None:
        return ""
    smaller = (point for point in points if point["bytes"] < best["bytes"] and point["low"] is not None)
    near = (point for point in smaller if point["low"] <= best["high"])
    least = min(near, key=lambda point: (point["bytes"], point["id"]), default=None)
    if least is None:
        return ""
    less = format_bytes(best["bytes"] - least["bytes"])
    return f"{least['label']} is {less} smaller, and this text does not tell the two apart."


def short(value: float) -> str:
    """Three digits that count, as the page writes them.

    >>> short(0.0095419), short(9.42e-05), short(1.5), short(0.0), short(1234.6), short(-0.25)
    ('0.00954', '9.4e-5', '1.50', '0', '1235', '-0.250')
    """
    if value == 0:
        return "0"
    if abs(value) < 0.0005:
        text = f"{value:.1e}"
    elif abs(value) >= 1000:
        text = f"{value:.4g}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return re.sub(r"e([+-])0*", r"e\1", text)
