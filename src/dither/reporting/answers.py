"""Answers: a file and its original, asked the same and given the same text to read.

    side by side    llama.cpp runs both; the likeliest token always, so that nothing is left to luck
    forced          both read one text, block by block in torch, and every token's divergence is kept

llama.cpp runs GGUFs.  An original that is a checkpoint becomes an F16 GGUF in a temporary folder first, and
a checkpoint of a GPU format likewise, from the very numbers that it stands for.  F16 keeps eleven bits of
a weight, which costs next to nothing beside quantization; a note says so.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither._version import __version__
from dither.engines.llamacpp import LlamaCpp
from dither.engines.vocabulary import Vocabulary
from dither.errors import UsageError
from dither.measuring.build import content_sha256, file_name
from dither.measuring.comparable import check_comparable
from dither.models.source import opened
from dither.progress import Progress, Silent
from dither.quantizing.quantize import quantize
from dither.reporting import answer_records as records
from dither.reporting.answer_records import Answer, Forced, ForcedToken, Recorded, Side
from dither.running.divergence import first_difference
from dither.system.files import make_folder
from dither.types import Model

if TYPE_CHECKING:
    from dither.measuring.teacher_forcing import Expectation

TOKENS = 64
MOST_TOKENS = 1024  # of one answer
LONGEST_PROMPT = 16_384  # characters
FORCED_TOKENS = 1024  # of one text
PROMPTS = (
    "Once upon a time",
    "The most important thing to know about the sea is",
    "Question: What is the capital of France?\nAnswer:",
)


def answers(
    file: str | Path | Model,
    against: str | Path | Model,
    *,
    prompts: Sequence[str] = PROMPTS,
    text: str | None = None,
    max_tokens: int = TOKENS,
    threads: int | None = None,
    device: str = "cpu",
    save: bool = True,
    progress: Progress | None = None,
) -> Recorded:
    """Both models' continuations of each prompt, and with `text` what both expect at each of its tokens.

    With `save` they are kept as `<file>.answers.json`, for the page to show.  Raises UsageError where the
    two cannot be compared or a prompt is empty or too long, SourceError where one cannot be read, OutputError
    where the result cannot be written: all before the work.  EngineError where llama.cpp refuses a file.
    """
    report = progress or Silent()
    reference, model = opened(against), opened(file)
    notes = [*check_comparable(file_name(model), model, reference)]
    for prompt in prompts:
        _check_prompt(prompt, max_tokens)
    if text is not None:
        _check(text, "the text", records.LONGEST_TEXT)
    place = records.path_for(model.origin) if save else None
    if place is not None:
        records.check_writable(place)
    found: list[Answer] = []
    if prompts:
        with Sides(reference, model, threads=threads, progress=report) as sides:
            notes += sides.notes
            report.start(len(prompts), 0)
            for prompt in prompts:
                found.append(sides.answer(prompt, max_tokens))
                report.advance(1, "answering")
    read = [] if text is None else [forced(model, reference, text, device=device, progress=report)]
    recorded = Recorded(
        tool=f"dither {__version__}",
        file=file_name(model),
        file_sha256=content_sha256(model),
        reference=file_name(reference),
        answers=tuple(found),
        forced=tuple(read),
        notes=tuple(dict.fromkeys(notes)),
    )
    if place is not None:
        records.save(recorded, place)
    return recorded


class Sides:
    """An original and a file of it, both open in llama.cpp.  A context manager.

    `folder` keeps GGUFs that have to be made, under names that change with the model, to be used again;
    without it they lie in a temporary folder until the end.  `notes` says what was made.
    """

    def __init__(
        self,
        original: str | Path | Model,
        quantized: str | Path | Model,
        *,
        context: int = 0,
        folder: Path | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.notes: list[str] = []
        report = progress or Silent()
        with ExitStack() as stack:
            home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dither-answers-")))
            models = {"original": opened(original), "quantized": opened(quantized)}
            check_comparable(file_name(models["quantized"]), models["quantized"], models["original"])
            paths = {side: self._runnable(model, home, threads, report) for side, model in models.items()}
            self.engines = {
                side: stack.enter_context(LlamaCpp(path, context=context, threads=threads))
                for side, path in paths.items()
            }
            self._templated = all(engine.has_chat_template for engine in self.engines.values())
            self._stack = stack.pop_all()

    def stream(self, prompt: str, max_tokens: int = TOKENS) -> Iterator[dict[str, Any]]:
        """Both answers as they come, in turns: {"side", "text"} each; at last {"done": True, "answer": …}.

        A file with a chat template is asked in it.  Raises UsageError where the prompt is empty or longer
        than is taken.  Closing the iterator stops both models.
        """
        _check_prompt(prompt, max_tokens)
        turns = [{"role": "user", "content": prompt}]
        asked = self.engines["original"].apply_template(turns) if self._templated else prompt
        pieces: dict[str, list[str]] = {side: [] for side in self.engines}
        seconds = dict.fromkeys(self.engines, 0.0)
        with ExitStack() as stack:
            started = time.monotonic()
            running = {
                side: stack.enter_context(closing(engine.generate(asked, max_tokens=max_tokens, temperature=0.0)))
                for side, engine in self.engines.items()
            }
            while running:
                for side, writing in list(running.items()):
                    piece = next(writing, None)
                    seconds[side] = time.monotonic() - started
                    if piece is None:
                        del running[side]
                        continue
                    pieces[side].append(piece)
                    yield {"side": side, "text": piece}
        sides = {side: Side(tokens=tuple(pieces[side]), seconds=seconds[side]) for side in pieces}
        apart = first_difference(pieces["original"], pieces["quantized"])
        yield {"done": True, "answer": Answer(prompt=prompt, first_divergence=apart, **sides).to_json()}

    def answer(self, prompt: str, max_tokens: int = TOKENS) -> Answer:
        """Both answers, once they are complete.  Raises as `stream` does."""
        *_, last = self.stream(prompt, max_tokens)
        return Answer.model_validate(last["answer"])

    def close(self) -> None:
        """Stops both engines and removes what lay in the temporary folder.  May be called twice."""
        self._stack.close()

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _runnable(self, model: Model, folder: Path, threads: int | None, report: Progress) -> Path:
        """The model's own GGUF, or one that is made of it."""
        if model.kind == "gguf":
            return Path(model.files[0])
        path = folder / f"{model.fingerprint[:16]}-F16.gguf"
        note = f"{file_name(model)} was run as an F16 GGUF, which llama.cpp needs."
        self.notes.append(note)
        if not path.exists():
            report.note(note)
            make_folder(folder, "Set TMPDIR to a larger disk.")
            quantize(model, "F16", path, threads=threads, progress=report)
        return path


def forced(
    file: str | Path | Model,
    against: str | Path | Model,
    text: str,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Forced:
    """What both models expect at each token of `text`, of which the first 1024 tokens are read.

    Raises UsageError where the text is empty, too long, or a single token; else as `dither.measure` does.
    """
    _check(text, "the text", records.LONGEST_TEXT)
    reference, model = opened(against), opened(file)
    check_comparable(file_name(model), model, reference)
    from dither.models.blocks import open_blocks

    blocks = [open_blocks(each, device=device) for each in (reference, model)]
    from dither.measuring.teacher_forcing import expectations  # imports torch
    from dither.measuring.text import trained_context

    limit = min(FORCED_TOKENS, trained_context(reference) or FORCED_TOKENS)
    with Vocabulary(reference) as vocabulary:
        begin = [] if vocabulary.bos is None else [vocabulary.bos]
        ids = [*begin, *vocabulary.tokenize(text)][:limit]
        if len(ids) < 2:
            raise UsageError("the text", "is a single token", "Give at least a few words.")
        found = expectations(blocks[0], blocks[1], ids, top=records.TOP, progress=progress)
        return _worded(vocabulary, text, ids[len(begin) :], found, begins=not begin)


def _worded(
    vocabulary: Vocabulary, text: str, ids: Sequence[int], found: Sequence[Expectation], begins: bool
) -> Forced:
    """Ids as text.  With `begins` the first token has nothing before it, and so no expectation."""
    # A token's text as it stands inside a text: alone, some tokenizers drop its leading space.
    before = vocabulary.tokenize("a")[-1:]
    prefix = vocabulary.detokenize(before)
    word = cache(lambda token: vocabulary.detokenize([*before, token]).removeprefix(prefix)[:1024])

    def top(side: Sequence[tuple[int, float]]) -> tuple[tuple[str, float], ...]:
        return tuple((word(token), min(1.0, share)) for token, share in side)

    tokens = [
        ForcedToken(
            text=word(token),
            kl=expected.kl,
            top_original=top(expected.top_reference),
            top_quantized=top(expected.top),
            same_top=expected.same_top,
        )
        for token, expected in zip(ids[begins:], found, strict=True)
    ]
    return Forced(text=text, tokens=(*([ForcedToken(text=word(ids[0]))] if begins else []), *tokens))


def _check_prompt(prompt: str, max_tokens: int) -> None:
    _check(prompt, "the prompt", LONGEST_PROMPT)
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise UsageError(f"an answer of {max_tokens} tokens", "is not possible", f"Ask for 1 to {MOST_TOKENS}.")


def _check(text: str, thing: str, longest: int) -> None:
    if not text.strip():
        raise UsageError(thing, "is empty", "Give a few words.")
    if len(text) > longest:
        raise UsageError(thing, f"has {len(text)} characters", f"Give {longest} at most.")
