"""A Modelfile for Ollama: the model, its chat template as a Go template, what ends an answer.

A GGUF carries its chat template in Jinja; Ollama renders Go's text/template.  There is no table of families:
llama.cpp renders conversations of known words, and what the template writes around the words are its pieces.

    head     before the first question, without a system text
    system   (before, after): before and after the system text, up to the first question
    answer   between a question and its answer        next    between an answer and the next question
    open     after the last question, where the model continues

Templates differ in where the system text goes: to the start (ChatML, Llama 3), into the first question (Llama 2,
Gemma) or into the last (Mistral).  The pieces cover these; prompts put together from them are compared with what
the template renders for more conversations, and a Go template is written only if all are the same.  Otherwise none
is written: Ollama then looks at the Jinja text itself and takes the most similar of the templates that it knows.

Source: Ollama's documentation (docs/modelfile.md, docs/template.md); Go's package text/template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dither.errors import DitherError
from dither.formats.ggml import Field

CONTEXT = 8192  # tokens at most, unless a person asks for more: they cost memory
_CONTROL = 3  # the type of a control token in GGUF
_SYSTEM, _WORDS = "Qsystem0", ("Qfirst1", "Qreply2", "Qsecond3", "Qreply4", "Qthird5")
_MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>|\[/?[A-Z_]{2,30}\]")  # never in prose, whether they are tokens or not
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
    last: tuple[str, str] | None = None  # around a system text that goes before the last question instead

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for alternating questions and answers, with or without a system text before them."""
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
    """What Ollama is told about a GGUF called `name`.

    `apply` renders messages with the file's own chat template; None if it has none.  `context` None takes what the
    model was trained on, up to 8192.
    """
    trained = metadata.get(f"{arch}.context_length")
    size = context or min(int(trained.value) if trained else CONTEXT, CONTEXT)
    temperature = metadata.get("general.sampling.temp")
    warmth = temperature.value if temperature else None
    warmth = float(warmth) if isinstance(warmth, int | float) and 0 <= warmth <= 10 else None
    if apply is None:
        return Ollama(name, "{{ .Prompt }}", (), size, warmth, ("No chat template: a base model.",))
    pieces, notes = pieces_of(apply)
    if pieces is None:
        return Ollama(name, None, (), size, warmth, tuple(notes))
    dated = metadata.get("tokenizer.chat_template")
    if dated and "strftime_now" in str(dated.value):
        notes.append("The chat template asks for today's date: Ollama will always get the day of this export.")
    template = go_template(pieces)
    if '"""' in template:
        return Ollama(name, None, (), size, warmth, ("The chat template has quotes that a Modelfile cannot hold.",))
    return Ollama(name, template, stops_of(pieces, metadata), size, warmth, tuple(notes))


def pieces_of(apply: Apply) -> tuple[Pieces | None, list[str]]:
    """The pieces of a chat template, or None if they do not reproduce it; and notes."""
    unknown = "The chat template is of no known kind: none is written, Ollama takes the most similar it knows."
    notes: list[str] = []
    with suppress(DitherError):  # the template refuses a conversation
        plain, opened = _parted(apply(_talk(5)), _WORDS), _parted(apply(_talk(1)), _WORDS[:1])
        if plain is None or opened is None:
            return None, [unknown]
        pieces = Pieces(plain[0], None, plain[1], plain[2], opened[1])
        checked = [_talk(count) for count in (1, 3, 5)]
        try:
            pieces = _with_system(pieces, apply)
            checked += [[{"role": "system", "content": "Be kind."}, *talk] for talk in checked]
        except DitherError:
            pieces = replace(pieces, system=(pieces.head, "\n\n"))
            notes.append("The chat template refuses system texts: they are put before the first question.")
        if all(pieces.render(talk) == apply(talk) for talk in checked):
            return pieces, notes
    return None, [unknown]


def _with_system(pieces: Pieces, apply: Apply) -> Pieces:
    told = {"role": "system", "content": _SYSTEM}
    first = _parted(apply([told, *_talk(1)]), (_SYSTEM, _WORDS[0]))
    if first is None:
        return pieces
    last = _parted(apply([told, *_talk(3)]), (*_WORDS[:2], _SYSTEM, _WORDS[2]))
    return replace(pieces, system=(first[0], first[1]), last=None if last is None else (last[2], last[3]))


def _talk(count: int) -> list[Message]:
    """A conversation of `count` alternating questions and answers, in words that no template has."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": _WORDS[index]} for index in range(count)]


def _parted(text: str, words: Sequence[str]) -> list[str] | None:
    """The text before, between and after `words`; None if each does not occur once, in this order."""
    found = re.fullmatch("(.*)".join(["", *map(re.escape, words), ""]), text, re.DOTALL)
    return list(found.groups()) if found and all(text.count(word) == 1 for word in words) else None


def go_template(pieces: Pieces) -> str:
    """The pieces as a template of Go's text/template; Ollama fills in `.System`, `.Messages` of `.Role`, `.Content`.

    After an answer, the piece that follows the last question is left out: Ollama then lets the model continue it.
    """
    first = _told(pieces.system, pieces.head)
    later = _literal(pieces.next)
    if pieces.last:
        # The system text goes before the last question: is this message the last one?
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
    """Text that Go's template copies as it is: braces, which would begin an action, become a string constant."""
    return text.replace("{{", '{{ "{{" }}')


def stops_of(pieces: Pieces, metadata: Mapping[str, Field]) -> tuple[str, ...]:
    """The template's markers that end an answer: one of them in an answer begins another turn."""
    lists = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    tokens, kinds = (() if found is None else list(found.value) for found in lists)
    control = [str(token) for token, kind in zip(tokens, kinds, strict=False) if int(kind) == _CONTROL]
    text = pieces.answer + pieces.next + pieces.open
    known = [token for token in control if token and token in text] + _MARKER.findall(text)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None and 0 <= int(eos.value) < len(tokens):
        known.append(str(tokens[int(eos.value)]))
    usable = [stop for stop in dict.fromkeys(known) if stop.isprintable() and '"' not in stop and stop.strip()]
    return tuple(usable[:_MOST_STOPS])
