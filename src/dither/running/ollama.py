"""A Modelfile for Ollama: the model, its chat template in Go's language, what ends an answer.

A GGUF carries its chat template in Jinja; Ollama renders templates of Go's text/template.  Instead of a
table of families, the template is asked: conversations of known words are rendered by llama.cpp, and
what stands around the words are the pieces of the template.

    head     before the first question, without a system text
    system   (before, after): before and behind the system text, up to the first question
    answer   between a question and its answer        next    between an answer and the next question
    open     behind the last question, where the model goes on

Templates of one family differ in system texts: told once at the start (ChatML, Llama 3), folded into the
first question (Llama 2, Gemma) or into the last (Mistral).  The pieces know these; they are put together
again and held against more conversations, and only a template that they reproduce to the letter is
written.  For any other, none is: Ollama then looks at the Jinja text itself and takes the likest of the
templates that it knows.

Source: Ollama's documentation (docs/modelfile.md, docs/template.md); Go's package text/template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dither.errors import DitherError
from dither.formats.ggml import Field

CONTEXT = 8192  # tokens, where the model was trained on more: memory for more is the person's to ask for
_CONTROL = 3  # a token's type in GGUF: it steers, and is no text
_SYSTEM, _WORDS = "Qsystem0", ("Qfirst1", "Qreply2", "Qsecond3", "Qreply4", "Qthird5")
_MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>|\[/?[A-Z_]{2,30}\]")  # in no prose, tokens or not
_MOST_STOPS = 12

Message = Mapping[str, str]
Apply = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the words (see the top of this file)."""

    head: str
    system: tuple[str, str] | None
    answer: str
    next: str
    open: str
    last: tuple[str, str] | None = None  # around a system text that is told before the last question instead

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for questions and answers in turn, a system text before them or not."""
        told = [message["content"] for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        text = ""
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                text += self.answer + turn["content"]
                continue
            plain = self.head if index == 0 else self.next
            around = self.system if index == 0 else self.last
            if index < len(turns) - 1 and (index or self.last):
                around = None
            text += (around[0] + told[0] + around[1] if told and around else plain) + turn["content"]
        return text + self.open


@dataclass(frozen=True)
class Ollama:
    """What a Modelfile says; `notes` are for the person who asked for it."""

    model: str  # the file's name
    template: str | None
    stops: tuple[str, ...]
    context: int
    temperature: float | None = None
    notes: tuple[str, ...] = field(default=())

    def modelfile(self) -> str:
        lines = [f"FROM ./{self.model}"]
        if self.template is not None:
            lines.append(f'TEMPLATE """{self.template}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        lines.append(f"PARAMETER num_ctx {self.context}")
        if self.temperature is not None:
            lines.append(f"PARAMETER temperature {self.temperature:g}")
        return "\n".join(lines) + "\n"


def describe(
    name: str, arch: str, metadata: Mapping[str, Field], apply: Apply | None, context: int | None = None
) -> Ollama:
    """What to tell Ollama about a GGUF called `name`.

    `apply` renders messages in the file's own chat template; None where it has none.  `context` None
    takes what the model was trained on, up to 8192.
    """
    trained = metadata.get(f"{arch}.context_length")
    size = context or min(int(trained.value) if trained else CONTEXT, CONTEXT)
    warmth = _temperature(metadata)
    if apply is None:
        return Ollama(name, "{{ .Prompt }}", (), size, warmth, ("No chat template: a base model.",))
    pieces, notes = pieces_of(apply)
    if pieces is None:
        return Ollama(name, None, (), size, warmth, tuple(notes))
    dated = metadata.get("tokenizer.chat_template")
    if dated and "strftime_now" in str(dated.value):
        notes.append("The chat template asks for today's date: Ollama will be told the day of this export.")
    template = go_template(pieces)
    if '"""' in template:
        return Ollama(name, None, (), size, warmth, ("The chat template holds quotes no Modelfile can.",))
    return Ollama(name, template, stops_of(pieces, metadata), size, warmth, tuple(notes))


def _temperature(metadata: Mapping[str, Field]) -> float | None:
    found = metadata.get("general.sampling.temp")
    value = found.value if found else None
    return float(value) if isinstance(value, int | float) and 0 <= value <= 10 else None


def pieces_of(apply: Apply) -> tuple[Pieces | None, list[str]]:
    """A chat template taken apart, or None where the pieces do not make it again; and what to know."""
    unknown = "The chat template is of no known kind: none is written, Ollama chooses the likest it knows."
    notes: list[str] = []
    try:
        plain = _parted(apply(_talk(5)), _WORDS)
        opened = _parted(apply(_talk(1)), _WORDS[:1])
    except DitherError:
        return None, [unknown]
    if plain is None or opened is None:
        return None, [unknown]
    pieces = Pieces(plain[0], None, plain[1], plain[2], opened[1])
    try:
        pieces = _with_system(pieces, apply)
    except DitherError:
        pieces = Pieces(pieces.head, (pieces.head, "\n\n"), pieces.answer, pieces.next, pieces.open)
        notes.append("The chat template refuses system texts: they are put before the first question.")
    checked = [_talk(count) for count in (1, 3, 5)]
    if not notes:
        checked += [[{"role": "system", "content": "Be kind."}, *talk] for talk in checked]
    try:
        exact = all(pieces.render(talk) == apply(talk) for talk in checked)
    except DitherError:
        exact = False
    return (pieces, notes) if exact else (None, [unknown])


def _with_system(pieces: Pieces, apply: Apply) -> Pieces:
    told = {"role": "system", "content": _SYSTEM}
    first = _parted(apply([told, *_talk(1)]), (_SYSTEM, _WORDS[0]))
    if first is None:
        return pieces
    last = _parted(apply([told, *_talk(3)]), (*_WORDS[:2], _SYSTEM, _WORDS[2]))
    around = None if last is None else (last[2], last[3])
    return Pieces(pieces.head, (first[0], first[1]), pieces.answer, pieces.next, pieces.open, around)


def _talk(count: int) -> list[Message]:
    """So many turns, question and answer by turns, of words that no template has."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": _WORDS[index]} for index in range(count)]


def _parted(text: str, words: Sequence[str]) -> list[str] | None:
    """What stands before, between and behind `words`; None where they do not come once each, in order."""
    if any(text.count(word) != 1 for word in words):
        return None
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def go_template(pieces: Pieces) -> str:
    """The same in Go's text/template, filled in by Ollama: `.System`, `.Messages` of `.Role`, `.Content`.

    What follows the last question is left out behind an answer: Ollama then lets the model go on with it.
    """
    first = _told(pieces.system, pieces.head)
    later = _literal(pieces.next)
    if pieces.last:
        # Told before the last question: the first is that only where it stands alone.
        alone = "eq (len (slice $.Messages $i)) 1"
        first = f"{{{{ if {alone} }}}}{first}{{{{ else }}}}{_literal(pieces.head)}{{{{ end }}}}"
        later = f"{{{{ if {alone} }}}}{_told(pieces.last, pieces.next)}{{{{ else }}}}{later}{{{{ end }}}}"
    return (
        '{{ $seen := false }}{{ $role := "" }}'
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
        f"{{{{ if $seen }}}}{later}{{{{ else }}}}{first}{{{{ end }}}}{{{{ $m.Content }}}}"
        '{{ $seen = true }}{{ $role = "user" }}'
        '{{ else if eq $m.Role "assistant" }}'
        f'{_literal(pieces.answer)}{{{{ $m.Content }}}}{{{{ $role = "assistant" }}}}'
        "{{ end }}{{ end }}"
        f'{{{{ if eq $role "user" }}}}{_literal(pieces.open)}{{{{ end }}}}'
    )


def _told(around: tuple[str, str] | None, plain: str) -> str:
    if around is None:
        return _literal(plain)
    told = f"{_literal(around[0])}{{{{ $.System }}}}{_literal(around[1])}"
    return f"{{{{ if $.System }}}}{told}{{{{ else }}}}{_literal(plain)}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text that Go's template copies: braces, which would begin an action, as a string constant."""
    return text.replace("{{", '{{ "{{" }}')


def stops_of(pieces: Pieces, metadata: Mapping[str, Field]) -> tuple[str, ...]:
    """Words that end an answer, markers of the template: an answer that holds one has begun another turn."""
    tokens, kinds = (_list(metadata, key) for key in ("tokens", "token_type"))
    control = [str(token) for token, kind in zip(tokens, kinds, strict=False) if int(kind) == _CONTROL]
    text = pieces.answer + pieces.next + pieces.open
    known = [token for token in control if token and token in text] + _MARKER.findall(text)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None and 0 <= int(eos.value) < len(tokens):
        known.append(str(tokens[int(eos.value)]))
    usable = [stop for stop in dict.fromkeys(known) if stop.isprintable() and '"' not in stop and stop.strip()]
    return tuple(usable[:_MOST_STOPS])


def _list(metadata: Mapping[str, Field], key: str) -> Sequence[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    return () if found is None else list(found.value)
