"""View 8, "Which method?", from `texts/guide.toml`: three questions, one answer for each combination.

The file is written for a writer: steps are named once, and an entry of an answer or a reason holds for all
combinations of options that its `for` fits.  Here every combination gets its own answer, whole, as the page reads
it.  There are no dead ends: each ends in commands to copy, and every other method says why it is not the answer.

The facts are those of docs/formats.md, docs/load.md and docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, product
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from dither.reporting import texts
from dither.reporting.texts import Prose

_FILE = "guide.toml"
Patterns = Annotated[tuple[str, ...], Field(alias="for")]


class Option(texts.Entry):
    id: str
    text: str
    hint: str


class Question(texts.Entry):
    id: str
    text: str
    options: tuple[Option, ...]


class Factor(texts.Entry):
    """What people compare methods by; `id` is the key of its cell in every method."""

    title: str
    id: str


class Step(texts.Entry):
    """One thing to copy; `needs` names the program where it is not ours."""

    command: str
    why: Prose
    kind: Literal["sh", "python"] = "sh"
    needs: str = ""


class Advice(texts.Entry):
    """The answer, or part of it, to the combinations that it is `for`; steps by their names."""

    patterns: Patterns
    method: str = ""
    title: str = ""
    because: Prose = ""
    steps: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    better_why: Prose = ""


class Reasons(texts.Entry):
    """By method, why it is not the answer to the combinations that they are `for`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Prose]
    patterns: Patterns


class Topic(texts.Entry):
    id: str
    title: str
    text: Prose


class Arithmetic(texts.Entry):
    """The size of a file from the number of its weights."""

    example: int  # weights
    bits: tuple[int, ...]
    rule: str
    why: tuple[Prose, ...]


class Guide(texts.Entry):
    source: str
    tag: Literal["measured", "estimated", "literature", "told"]
    questions: tuple[Question, ...]
    factors: tuple[Factor, ...]
    methods: tuple[dict[str, str | tuple[str, Literal["+", "-", ""]]], ...]
    steps: dict[str, Step]
    answers: tuple[Advice, ...]
    ruled_out: tuple[Reasons, ...]
    topics: tuple[Topic, ...]
    arithmetic: Arithmetic

    def answer(self, path: str) -> dict[str, Any]:
        """The whole answer to one combination, "laptop/run/yes".  Raises FormatError where something is missing."""
        said: dict[str, Any] = {name: () if name in ("steps", "better") else "" for name in _SAID}
        for entry in _fitting(self.answers, path):
            said |= entry.model_dump(include=entry.model_fields_set & set(_SAID))
        for name in ("method", "title", "because", "steps"):
            if not said[name]:
                raise texts.wrong(_FILE, f"no entry of `answers` says the {name} of {path}")
        for name in ("steps", "better"):
            for step in said[name]:
                if step not in self.steps:
                    reason = f"the answer to {path} names the step {step!r}, which is not among `steps`"
                    raise texts.wrong(_FILE, reason)
            said[name] = [self.steps[step].model_dump() for step in said[name]]
        reasons: dict[str, str] = {}
        for group in _fitting(self.ruled_out, path):
            reasons |= group.__pydantic_extra__
        others = [str(method["method"]) for method in self.methods if method["method"] != said["method"]]
        for method in others:
            if method not in reasons:
                raise texts.wrong(_FILE, f"no entry of `ruled_out` says why {method} is not the answer to {path}")
        return {**said, "ruled_out": [{"method": method, "reason": reasons[method]} for method in others]}


_SAID = ("method", "title", "because", "steps", "better", "better_why")


def _fitting(entries: Iterable[Any], path: str) -> Iterable[Any]:
    return (entry for entry in entries if any(fnmatchcase(path, pattern) for pattern in entry.patterns))


@cache
def guide() -> dict[str, Any]:
    """The guide as the results document has it.  Raises FormatError naming the entry that breaks a rule."""
    return whole(texts.load(_FILE, Guide))


def whole(found: Guide) -> dict[str, Any]:
    """Every combination of options with its answer.  Raises as `guide` does."""
    paths = ["/".join(path) for path in product(*([one.id for one in each.options] for each in found.questions))]
    for pattern in chain.from_iterable(e.patterns for e in chain[Advice | Reasons](found.answers, found.ruled_out)):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise texts.wrong(_FILE, f"{pattern!r} fits no combination of options, such as {paths[0]}")
    said = found.model_dump(mode="json", include=set(_SHOWN))
    said["answers"] = {path: found.answer(path) for path in paths}
    return {name: said[name] for name in _SHOWN}


_SHOWN = ("questions", "answers", "factors", "methods", "topics", "arithmetic", "source", "tag")
