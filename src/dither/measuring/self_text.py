"""`--data self`: the model writes the text that it is calibrated on.

Calibration needs inputs like those the model will see, and no data set is closer to what it was trained on than
what it writes by itself.  A base model starts with a random word and continues at temperature 1; min-p 0.05 cuts
off tokens less than a twentieth as likely as the best, so that one unlucky draw does not derail the rest.  A chat
model writes every second text as a conversation: given only the start of a user's turn in its own template it
invents the question, then answers it (Magpie, arXiv:2406.08464, section 2).  Texts are joined and cut into
sequences of the context's length, as files are.

llama.cpp writes them: with the file itself if it is a GGUF of about 8 bits per weight or fewer, otherwise with a
temporary Q8_0 copy.  Several texts are written at once, because one pass over the weights then serves all of them.
They are asked for in one request, so that their order, and with it every last digit, depends on the seed alone:
the same seed on the same machine gives the same text.  A request goes at most 256 tokens on, and is kept when it
is answered (`written`), so that an interrupted run goes on where it was and ends with the same text; continuing a text
means reading it once more, which is why requests are not shorter.

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
from dither.measuring.calibration_folder import WRITER, WRITER_FILE
from dither.measuring.cutting import pieces, with_bos
from dither.measuring.written import Written
from dither.progress import Progress, Silent
from dither.types import Model, Tensor, Yes

SLOTS = 8  # texts written at once
_ASKED_AT_ONCE = 2 * SLOTS  # more would keep all slots busy to the end, but progress would stand still
_ENOUGH_BITS = 8.6  # Q8_0 with its norms; finer weights write no better text, and are slower
_CHUNK_WEIGHTS = 2**22
_FILE_TYPE_Q8_0 = 7  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0
_NORMAL = 1  # llama.cpp's LLAMA_TOKEN_TYPE_NORMAL
_MARK = "QUESTION"
_SHORTEST = 8  # tokens; shorter texts are of no use
_GOES_ON = 256  # tokens that one request adds to each text
_FRUITLESS = 4  # requests in a row that yield nothing before giving up
_Text = list[int]


def write_text(
    model: Model,
    count: int,
    spare: int = 0,
    *,
    context: int,
    seed: int,
    scratch: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[_Text], str, tuple[str, ...]]:
    """`count` sequences of `context` token ids that the model wrote, and `spare` others; their name; notes.

    The first `count` are the same whatever is spare.

    What `scratch` holds of an interrupted run of the same work is used, and what is written is kept there: the text,
    and the Q8_0 file that writes it.  Without a `scratch` nothing is kept.
    Raises EngineError if llama.cpp cannot run the model, OutputError if the disk is full.
    """
    report = progress or Silent()
    with _runnable(model, scratch, report) as (path, notes):
        report.note("The model writes its own text.")
        with _Writer(path, context=context, seed=seed, threads=threads, slots=SLOTS) as writer:
            writer.kept = Written(scratch)
            report.start((count + spare) * context, 0)
            stream, more = _write(writer, model, count, context, np.random.default_rng(seed), report)
            found = pieces(stream, context, writer.bos)[:count]
            if spare:
                stream, _ = _write(writer, model, spare, context, np.random.default_rng([seed, 1]), report)
                found += pieces(stream, context, writer.bos)[:spare]
            if writer.kept.replayed:
                report.note(f"{writer.kept.replayed} tokens of the text were kept from before the interruption.")
    return found, f"self (seed {seed})", (*notes, *more)


class _Writer(LlamaCpp):
    """llama.cpp with several slots, each of them with a context of its own."""

    kept = Written(None)

    def continued(self, prompts: Sequence[_Text], limit: int, seed: int, report: Progress) -> list[_Text]:
        """The continuation of each prompt, with the end token if the model ended it."""
        written: list[_Text] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for start in range(0, limit, _GOES_ON):
            step = min(_GOES_ON, limit - start)
            asked = [[*prompts[index], *written[index]] for index in going]
            found = self._goes_on(asked, step, seed + start, report)
            for index, text in zip(going, found, strict=True):
                written[index] += text
            going = [index for index, text in zip(going, found, strict=True) if len(text) == step]
            if not going:
                break
        return written

    def _goes_on(self, prompts: Sequence[_Text], limit: int, seed: int, report: Progress) -> list[_Text]:
        """One request, or what it was answered before the run was interrupted."""
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

        def write() -> list[_Text]:
            # Not streamed: a stream of text pieces leaves out tokens that end inside a character.
            answers = self._call("/completion", body)
            texts: list[_Text] = [[] for _ in prompts]
            for answer in answers if isinstance(answers, list) else [answers]:
                texts[int(answer.get("index", 0))] = [int(token) for token in answer["tokens"]]
            return texts

        written = self.kept.answers(body, write)
        report.advance(sum(map(len, written)), "writing text")
        return written


def _write(
    writer: _Writer, model: Model, sequences: int, context: int, rng: np.random.Generator, report: Progress
) -> tuple[_Text, list[str]]:
    """One stream of tokens, long enough for all sequences, and notes."""
    words_V = _word_starts(model)
    wanted = sequences * context
    opening = _user_opening(writer)
    chats = bool(opening) and len(opening) + 2 * _SHORTEST < context
    notes = []
    if opening and not chats:
        notes.append(f"A context of {context} has no room for the chat template: no conversations were written.")
    stream: _Text = []
    asked = fruitless = 0
    while len(stream) < wanted:
        count = min(_ASKED_AT_ONCE, -(-(wanted - len(stream)) // context))
        request = int(rng.integers(2**31))
        if chats and asked % 2:
            texts = _conversations(writer, opening, count, context, request, report)
        else:
            starts = [with_bos([int(word)], writer.bos) for word in rng.choice(words_V, count)]
            written = writer.continued(starts, context - len(starts[0]), request, report)
            texts = [start + text for start, text in zip(starts, written, strict=True)]
        useful = [text[:context] for text in texts if len(text) >= _SHORTEST]
        stream += [token for text in useful for token in text]
        asked += 1
        fruitless = 0 if useful else fruitless + 1
        if fruitless == _FRUITLESS:
            way_out = "Give it a text to calibrate on: --data FILE."
            raise EngineError(model.origin, "the model writes next to nothing by itself", way_out)
    return stream, notes


def _conversations(
    writer: _Writer, opening: _Text, count: int, context: int, seed: int, report: Progress
) -> list[_Text]:
    """Questions first, then their answers."""
    room = (context - len(opening)) // 2  # for the question; as much is left for the answer
    asked = writer.continued([opening] * count, room, seed, report)
    questions = [writer.detokenize(text).strip() for text in asked]
    # A question with a replacement character was cut inside a character.
    asking = [[{"role": "user", "content": text}] for text in questions if text and "\ufffd" not in text]
    prompts = [with_bos(writer.tokenize(writer.apply_template(messages)), writer.bos) for messages in asking]
    prompts = [prompt for prompt in prompts if len(prompt) < context]
    if not prompts:
        return []
    limit = context - min(map(len, prompts))
    answers = writer.continued(prompts, limit, seed + 1, report)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def _user_opening(writer: _Writer) -> _Text:
    """The template up to the user's first word; empty if there is no template, or if it drops what the user says."""
    if not writer.has_chat_template:
        return []
    before, mark, _ = writer.apply_template([{"role": "user", "content": _MARK}]).partition(_MARK)
    return with_bos(writer.tokenize(before), writer.bos) if mark and before else []


def _word_starts(model: Model) -> Any:
    """Ids of ordinary tokens that begin a word, a space and then letters; all ordinary ones if there are none."""
    tokens = model.value("tokenizer.ggml.tokens")
    kind_V = np.asarray(model.value("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL)))
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
    told = ["The text was written by a Q8_0 copy of the model."]
    if scratch is not None:
        path = scratch / WRITER_FILE
        if not path.is_file():
            write_q8_0(model, path, report)
        yield path, told
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix=WRITER)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise OutputError(tempfile.gettempdir(), reason, "Set TMPDIR to another folder.") from None
    with folder:
        path = Path(folder.name) / "writer.gguf"
        write_q8_0(model, path, report)
        yield path, told


def write_q8_0(model: Model, path: Path, report: Progress) -> None:
    """A GGUF of the model by plain Q8_0 rounding, a chunk of rows at a time; routers and vectors float."""
    metadata = {**model.metadata, **recipe_metadata(_FILE_TYPE_Q8_0, "{}")}
    types = {tensor.name: _small_type(tensor) for tensor in model.tensors}
    entries = [(tensor.name, tensor.shape, types[tensor.name]) for tensor in model.tensors]
    report.start(model.parameters, 0)
    with GGUFOutput(path, metadata, entries, model.fingerprint) as output:
        for tensor in model.tensors:
            if tensor.name in output.finished:
                report.advance(tensor.size, "preparing a Q8_0 copy to write text with")
                continue
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
