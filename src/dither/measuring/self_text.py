"""`--data self`: the model writes the text that it is calibrated on.

Calibration wants inputs like those the model will meet, and no data set is nearer to what it learnt than
what it says by itself.  A base model begins with a word drawn at random and continues at temperature 1;
min-p 0.05 cuts off tokens less than a twentieth as likely as the best, so that one unlucky draw does not
derail the rest.  A chat model writes every second text as a conversation: given only the start of a
user's turn in its own template it invents the question, then answers it (Magpie, arXiv:2406.08464,
section 2).  Texts are laid end to end and cut into sequences of the context's length, as files are.

llama.cpp writes them: on the file itself where it is a GGUF of about 8 bits per weight or fewer, else on
a temporary Q8_0 copy.  Several texts are written at once, because one pass over the weights then serves
all of them.  They are asked for in one request, so that their order, and with it every last digit,
depends on nothing but the seed: the same seed on the same machine gives the same text.

Legend: R rows of a chunk, C columns, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dither.codecs import codec as find_codec
from dither.containers.gguf import GGUFOutput, can_hold, recipe_metadata
from dither.engines.llamacpp import EngineError, LlamaCpp
from dither.errors import OutputError
from dither.measuring.calibration_folder import WRITER
from dither.progress import Progress, Silent
from dither.types import Model, Tensor, Yes

SLOTS = 8  # texts written at once
_ASKED_AT_ONCE = 2 * SLOTS  # more would leave no slot idle, and nobody told how far it is
_ENOUGH_BITS = 8.6  # Q8_0 with its norms; finer weights write no better text, only more slowly
_CHUNK_WEIGHTS = 2**22
_FILE_TYPE_Q8_0 = 7  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0
_NORMAL = 1  # llama.cpp's LLAMA_TOKEN_TYPE_NORMAL
_MARK = "QUESTION"
_SHORTEST = 8  # tokens; of less than that nothing is learnt
_FRUITLESS = 4  # requests in a row that yield nothing before giving up
_Text = list[int]


def write_text(
    model: Model,
    *,
    tokens: int,
    context: int,
    seed: int,
    scratch: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[_Text], str, tuple[str, ...]]:
    """`tokens` // `context` sequences of `context` token ids that the model wrote; their name; notes.

    A temporary Q8_0 file goes into `scratch` (the system's temporary folder unless given).
    Raises EngineError where llama.cpp cannot run the model, OutputError where the disk is full.
    """
    report = progress or Silent()
    with _runnable(model, scratch, report) as (path, notes):
        report.note("The model writes its own text.")
        with _Writer(path, context, seed, threads) as writer:
            stream, more = _write(writer, model, tokens // context, context, seed, report)
    found = [stream[at : at + context] for at in range(0, len(stream) - context + 1, context)]
    if writer.bos is not None:
        found = [[writer.bos, *text[1:]] for text in found]
    return found[: tokens // context], f"self (seed {seed})", (*notes, *more)


class _Writer(LlamaCpp):
    """llama.cpp with several slots, each of them with a context of its own."""

    def __init__(self, path: Path, context: int, seed: int, threads: int | None) -> None:
        self._longest = context
        super().__init__(path, context=context, seed=seed, threads=threads, slots=SLOTS)
        plain, special = (self.tokenize("a", add_special=add) for add in (False, True))
        begins = len(special) > len(plain) and special[0] != plain[0]
        self.bos = special[0] if begins else None

    def __enter__(self) -> _Writer:
        return self

    def continued(self, prompts: Sequence[_Text], limit: int, seed: int, report: Progress) -> list[_Text]:
        """What follows each prompt, its end token included where the model ended by itself."""
        body = {
            "prompt": list(prompts),
            "n_predict": limit,
            "cache_prompt": False,
            "seed": seed,
            "samplers": ["min_p", "temperature"],
            "temperature": 1.0,
            "min_p": 0.05,
            "return_tokens": True,
        }
        # In one answer: a stream of pieces leaves out tokens that end inside a character.
        answers = self._call("/completion", body)
        written: list[_Text] = [[] for _ in prompts]
        for answer in answers if isinstance(answers, list) else [answers]:
            written[int(answer.get("index", 0))] = [int(token) for token in answer["tokens"]]
        report.advance(sum(map(len, written)), "writing text")
        return written


def _write(
    writer: _Writer, model: Model, sequences: int, context: int, seed: int, report: Progress
) -> tuple[_Text, list[str]]:
    """One stream of tokens, long enough for all sequences, and notes."""
    rng = np.random.default_rng(seed)
    words_V = _word_starts(model)
    wanted = sequences * context
    opening = _user_opening(writer)
    chats = bool(opening) and len(opening) + 2 * _SHORTEST < context
    notes = (
        []
        if chats or not opening
        else [f"A context of {context} has no room for the chat template: no conversations were written."]
    )
    report.start(wanted, 0)
    stream: _Text = []
    asked = fruitless = 0
    while len(stream) < wanted:
        count = min(_ASKED_AT_ONCE, -(-(wanted - len(stream)) // context))
        request = int(rng.integers(2**31))
        if chats and asked % 2:
            texts = _conversations(writer, opening, count, context, request, report)
        else:
            starts = [[int(word)] for word in rng.choice(words_V, count)]
            texts = _monologues(writer, starts, context, request, report)
        useful = [text[:context] for text in texts if len(text) >= _SHORTEST]
        stream += [token for text in useful for token in text]
        asked += 1
        fruitless = 0 if useful else fruitless + 1
        if fruitless == _FRUITLESS:
            raise EngineError(
                model.origin,
                "the model writes next to nothing by itself",
                "Give it a text to calibrate on: --data FILE.",
            )
    return stream, notes


def _monologues(writer: _Writer, starts: list[_Text], context: int, seed: int, report: Progress) -> list[_Text]:
    begin = [] if writer.bos is None else [writer.bos]
    prompts = [begin + start for start in starts]
    written = writer.continued(prompts, context - len(prompts[0]), seed, report)
    return [prompt + text for prompt, text in zip(prompts, written, strict=True)]


def _conversations(
    writer: _Writer, opening: _Text, count: int, context: int, seed: int, report: Progress
) -> list[_Text]:
    """Questions first, at most half of the context long, then their answers."""
    room = (context - len(opening)) // 2
    asked = writer.continued([opening] * count, room, seed, report)
    questions = [writer.detokenize(text).strip() for text in asked]
    prompts = [_templated(writer, question) for question in questions if question and "\ufffd" not in question]
    prompts = [prompt for prompt in prompts if len(prompt) < context]
    if not prompts:
        return []
    limit = context - min(map(len, prompts))
    answers = writer.continued(prompts, limit, seed + 1, report)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def _templated(writer: _Writer, question: str) -> _Text:
    return _with_bos(writer, writer.tokenize(writer.apply_template([{"role": "user", "content": question}])))


def _with_bos(writer: _Writer, ids: _Text) -> _Text:
    return ids if writer.bos is None or ids[:1] == [writer.bos] else [writer.bos, *ids]


def _user_opening(writer: _Writer) -> _Text:
    """The template up to where a user begins to speak; nothing where there is no template, or it hides
    what the user says."""
    if not writer.has_chat_template:
        return []
    before, mark, _ = writer.apply_template([{"role": "user", "content": _MARK}]).partition(_MARK)
    return _with_bos(writer, writer.tokenize(before)) if mark and before else []


def _word_starts(model: Model) -> Any:
    """Ids of ordinary tokens that begin a word: a space, then letters.  Where there are none, all."""
    tokens = model.metadata["tokenizer.ggml.tokens"].value
    kinds = model.metadata.get("tokenizer.ggml.token_type")
    kind_V = np.full(len(tokens), _NORMAL) if kinds is None else np.asarray(kinds.value)
    words = [
        number
        for number, token in enumerate(tokens)
        if kind_V[number] == _NORMAL and token[:1] in ("Ġ", "▁") and len(token) > 2 and token[1:].isalpha()
    ]
    return np.array(words or np.flatnonzero(kind_V == _NORMAL))


@contextmanager
def _runnable(model: Model, scratch: Path | None, report: Progress) -> Iterator[tuple[Path, list[str]]]:
    """A GGUF of about 8 bits per weight or fewer: the model's own file, or a temporary copy."""
    bits = 8 * sum(tensor.stored_bytes for tensor in model.tensors) / max(1, model.parameters)
    if model.kind == "gguf" and bits <= _ENOUGH_BITS:
        yield Path(model.files[0]), []
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix=WRITER, dir=scratch)
    except OSError as error:
        raise OutputError(
            str(scratch), f"cannot be written ({error.strerror})", "Choose another place with -o."
        ) from None
    with folder:
        path = Path(folder.name) / "writer.gguf"
        write_q8_0(model, path, report)
        yield path, ["The text was written by a Q8_0 copy of the model."]


def write_q8_0(model: Model, path: Path, report: Progress) -> None:
    """A GGUF of the model by plain Q8_0 rounding, a chunk of rows at a time; routers and vectors float."""
    metadata = {**model.metadata, **recipe_metadata(_FILE_TYPE_Q8_0, "{}")}
    types = {tensor.name: _small_type(tensor) for tensor in model.tensors}
    entries = [(tensor.name, tensor.shape, types[tensor.name]) for tensor in model.tensors]
    report.start(model.parameters, 0)
    with GGUFOutput(path, metadata, entries, model.fingerprint) as output:
        for tensor in model.tensors:
            encode, step = find_codec(types[tensor.name]).encode, max(1, _CHUNK_WEIGHTS // tensor.columns)
            for start in range(0, tensor.rows, step):
                w_RC = tensor.read(start, min(start + step, tensor.rows))
                output.write_rows(tensor.name, start, encode(w_RC))
                report.advance(w_RC.size, "preparing a Q8_0 copy to write text with")
            output.finish(tensor.name, {})
        output.commit()


def _small_type(tensor: Tensor) -> str:
    if len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name:
        return "F32"
    return "Q8_0" if isinstance(can_hold("Q8_0", tensor.shape), Yes) else "F16"
