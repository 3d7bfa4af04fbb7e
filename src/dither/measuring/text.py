"""Text becomes sequences of token ids: what calibration and measurement run through a model.

    FILE                            plain text, cut into consecutive chunks of the context
    FILE.jsonl                      one record a line: {"text": …}, {"messages": [{"role", "content"}, …]}
                                    or {"prompt": …, "response": …}; each is a sequence of its own
    hf:DATASET[:SPLIT[:COLUMN]]     records of a data set, through the `datasets` library
    self                            the model writes its own (see `self_text`)

Plain text follows llama-imatrix and llama-perplexity (`tools/imatrix/imatrix.cpp`,
`tools/perplexity/perplexity.cpp` in llama.cpp), so that figures can be compared: the text is tokenized
in one piece, with the begin token in front if the tokenizer adds one; it is cut into chunks of the context's
length without overlap, a rest that does not fill a chunk is dropped, and the first token of every chunk is
replaced by the begin token if there is one.

Of a file only a prefix is read that holds the tokens asked for: it ends at the end of a line, and its length is
doubled until there are enough tokens.

Legend: S sequences, T token positions of the longest one.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.engines.vocabulary import Vocabulary
from dither.errors import SourceError, UsageError
from dither.measuring.cutting import chunks, pieces
from dither.measuring.records import Conversation, hub_records, json_records
from dither.progress import Progress
from dither.types import Model

Ints = npt.NDArray[np.int32]

DEFAULT_CONTEXT = 512  # llama-imatrix's
BATCH_TOKENS = 2048  # that go through a block together
SELF = "self"
HUB = "hf:"
_RECORDS = (".jsonl", ".json", ".ndjson")
_SHORTEST = 2  # a position and its next token
_FIRST_BYTES_PER_TOKEN = 6


@dataclass(frozen=True)
class Sequences:
    """Token ids as they go through a model.

    `tokens_ST` int32; sequence s has `lengths_S[s]` of them, and the zeros to their right are padding that
    never counts.  `sha256` (hex) covers the ids and lengths, not the padding.
    """

    tokens_ST: Ints
    lengths_S: Ints
    name: str
    sha256: str
    seed: int
    notes: tuple[str, ...] = ()
    spare: tuple[tuple[int, ...], ...] = ()  # further sequences, where they were asked for and are there

    @property
    def tokens(self) -> int:
        return int(self.lengths_S.sum())


def sequences(
    model: Model,
    data: str | Path,
    *,
    tokens: int,
    context: int | None = None,
    seed: int = 0,
    spare: int = 0,
    scratch: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Sequences:
    """At most `tokens` token ids of `data`, in sequences of at most `context` (512, or the model's).

    `spare` is how many sequences more are wanted, beside those; nothing is said where the data hold fewer.

    For `self`: the text is sampled with `seed`, `scratch` is a folder for a temporary file that may be as large
    as the model, `threads` defaults to the physical cores.  If there are fewer tokens than asked for, a note
    says so.

    Raises UsageError, before any work, if the context is longer than the model's, if the tokens do not fill
    one context, or if the data hold too few tokens; SourceError if they cannot be read.
    """
    context = checked_context(model, tokens, context)
    if str(data) == SELF:
        from dither.measuring.self_text import write_text

        count = tokens // context
        ids, name, notes = write_text(
            model, count, spare, context=context, seed=seed, scratch=scratch, threads=threads, progress=progress
        )
        return _with_spare(pack(ids[:count], name, seed, notes), ids[count:])
    with Vocabulary(model) as vocabulary:
        return _from_data(vocabulary, data, tokens, context, seed, spare)


def checked_context(model: Model, tokens: int, context: int | None) -> int:
    """The context to use.  Raises UsageError if it is longer than the model's, shorter than 2, or not filled."""
    trained = trained_context(model)
    if context is None:
        context = min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT)
    if context < _SHORTEST:
        raise UsageError(f"a context of {context}", "is too short", f"Give at least {_SHORTEST} tokens.")
    if trained and context > trained:
        reason = f"is longer than {model.name}'s {trained}"
        raise UsageError(f"a context of {context}", reason, f"Give at most {trained} with -c.")
    if tokens < context:
        way_out = "Ask for more with --tokens, or for a shorter context with -c."
        raise UsageError(f"{tokens} tokens", f"do not fill one sequence of {context}", way_out)
    return context


def trained_context(model: Model) -> int:
    """The context length in the model's metadata, 0 if there is none."""
    return int(model.value(f"{model.arch}.context_length", 0))


def pack(ids: Iterable[list[int]], name: str, seed: int, notes: Iterable[str] = ()) -> Sequences:
    """Lists of token ids, right-padded with zeros."""
    rows = list(ids)
    lengths_S = np.array([len(row) for row in rows], dtype=np.int32)
    tokens_ST = np.zeros((len(rows), int(lengths_S.max())), dtype=np.int32)
    for target_T, row in zip(tokens_ST, rows, strict=True):
        target_T[: len(row)] = row
    return Sequences(tokens_ST, lengths_S, name, tokens_sha256(tokens_ST, lengths_S), seed, tuple(notes))


def _with_spare(text: Sequences, ids: Iterable[list[int]]) -> Sequences:
    return replace(text, spare=tuple(map(tuple, ids)))


def tokens_sha256(tokens_ST: Ints, lengths_S: Ints) -> str:
    """sha256 (hex) over each sequence's length and ids, little-endian int32, padding left out."""
    digest = hashlib.sha256()
    for row_T, length in zip(tokens_ST, lengths_S, strict=True):
        digest.update(np.array([length], "<i4").tobytes() + row_T[:length].astype("<i4").tobytes())
    return digest.hexdigest()


def _from_data(vocabulary: Vocabulary, data: str | Path, tokens: int, context: int, seed: int, spare: int) -> Sequences:
    name = str(data)
    if name.startswith(HUB):
        return _from_records(vocabulary, hub_records(name.removeprefix(HUB)), tokens, context, seed, name, spare)
    path = Path(data).expanduser()
    if path.is_dir():
        raise SourceError(str(path), "is a folder", "Name a text file, or a .jsonl file of records.")
    if not path.is_file():
        way_out = "Name a text file, hf:DATASET, or `self` to let the model write its own text."
        raise SourceError(str(path), "no such file", way_out)
    if path.suffix.lower() in _RECORDS:
        return _from_records(vocabulary, json_records(path), tokens, context, seed, path.name, spare)
    count = tokens // context
    found = _plain_chunks(vocabulary, path, count + spare, context)
    if not found:
        raise _too_short(path.name, len(vocabulary.tokenize(_prefix(path, None))), context)
    notes = []
    if len(found) < count:
        notes.append(f"{path.name} fills {len(found)} sequences of {context} tokens, not the {count} asked for.")
    return _with_spare(pack(found[:count], path.name, seed, notes), found[count:])


def _too_short(name: str, found: int, needed: int) -> UsageError:
    reason = "is empty" if not found else f"holds {found} tokens, and one sequence needs {needed}"
    return UsageError(name, reason, "Give more text, or a shorter context with -c.")


def _plain_chunks(vocabulary: Vocabulary, path: Path, count: int, context: int) -> list[list[int]]:
    needed, total = count * context, path.stat().st_size
    size = min(total, needed * _FIRST_BYTES_PER_TOKEN + 1024)
    while True:
        ids = vocabulary.tokenize(_prefix(path, size))
        # The last tokens before a cut may differ from those of the whole text, so a few more are needed.
        if size >= total or len(ids) >= needed + 16:
            return chunks(ids, context, vocabulary.bos)[:count]
        size = min(total, 2 * size)


def _prefix(path: Path, size: int | None) -> str:
    """The first `size` bytes as text, up to the last end of a line if the file is longer.

    Raises SourceError if the bytes are not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(size)
    except OSError as error:
        raise SourceError(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from None
    cut = size is not None and len(raw) < path.stat().st_size
    if cut:
        raw = raw[: raw.rfind(b"\n") + 1] or raw
    try:
        # Unless the text is final, the decoder leaves out a character that the cut has split.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=not cut)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start})"
        raise SourceError(str(path), reason, "Convert it: iconv -t UTF-8 FILE.") from None


def _from_records(
    vocabulary: Vocabulary,
    records: Iterator[str | Conversation],
    tokens: int,
    context: int,
    seed: int,
    name: str,
    spare: int,
) -> Sequences:
    found: list[list[int]] = []
    more: list[list[int]] = []
    left, dropped, plain = tokens, 0, 0
    spared = spare * context  # tokens of spare sequences that are still wanted
    for record in records:
        plain += not isinstance(record, str) and not vocabulary.has_chat_template
        for piece in pieces(_record_ids(vocabulary, record), context, vocabulary.bos):
            if len(piece) < _SHORTEST:
                dropped += 1
                continue
            if left >= _SHORTEST:
                found.append(piece[:left])
                left -= len(found[-1])
            elif spared >= _SHORTEST:
                more.append(piece[:spared])
                spared -= len(more[-1])
            if left < _SHORTEST and spared < _SHORTEST:
                return _with_spare(pack(found, name, seed, _record_notes(name, tokens, 0, dropped, plain)), more)
    used, missing = tokens - left, left if left >= _SHORTEST else 0
    if used < min(tokens, context):
        raise _too_short(name, used, min(tokens, context))
    return _with_spare(pack(found, name, seed, _record_notes(name, tokens, missing, dropped, plain)), more)


def _record_ids(vocabulary: Vocabulary, record: str | Conversation) -> list[int]:
    if isinstance(record, str):
        return vocabulary.tokenize(record)
    if not vocabulary.has_chat_template:
        return vocabulary.tokenize("\n\n".join(message["content"] for message in record))
    return vocabulary.tokenize(vocabulary.apply_template(record), parse_special=True)


def _record_notes(name: str, asked: int, missing: int, dropped: int, plain: int) -> list[str]:
    notes = (
        (missing, f"{name} holds {asked - missing} tokens, not the {asked} asked for."),
        (dropped, f"{dropped} records of {name} are shorter than {_SHORTEST} tokens and were left out."),
        (plain, f"The model has no chat template: {plain} conversations of {name} became plain text."),
    )
    return [note for count, note in notes if count]


def batches(lengths_S: Ints, size: int) -> list[Any]:
    """Indices of neighboring sequences, at most `size` padded tokens at once."""
    count, each = len(lengths_S), max(1, size // max(1, int(lengths_S.max())))
    return [np.arange(start, min(start + each, count)) for start in range(0, count, each)]
