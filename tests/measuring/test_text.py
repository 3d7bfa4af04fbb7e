"""Text to sequences: against `tokenizers` and against a plain reading of llama.cpp's convention."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig

from dither.engines.vocabulary import Vocabulary
from dither.errors import DitherError, SourceError, UsageError
from dither.formats.ggml import string
from dither.measuring.cutting import pieces
from dither.measuring.text import batches, pack, sequences
from dither.models.source import open_model
from dither.types import Model
from models.families_util import TEXT, byte_level_tokenizer, random_model, save_model, with_bos

pytestmark = pytest.mark.slow  # real engines: `make test` runs it, `make check` does not

BOOK = (TEXT.strip() + "\n") * 12
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny(folder: Path, tokenizer: Tokenizer) -> Model:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    return open_model(save_model(random_model(config), folder, tokenizer))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer(size=500)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Model:
    return tiny(tmp_path_factory.mktemp("plain"), tokenizer)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Model]:
    model = tiny(tmp_path_factory.mktemp("begun"), with_bos(byte_level_tokenizer(size=500)))
    template = string(CHATML)
    yield Model(**{**model.__dict__, "metadata": {**model.metadata, "tokenizer.chat_template": template}})


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_text_is_cut_into_consecutive_chunks(plain: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = sequences(plain, written(tmp_path / "book.txt", BOOK), tokens=1000, context=48)
    ids = tokenizer.encode(BOOK, add_special_tokens=False).ids
    assert found.tokens_ST.shape == (20, 48)
    assert found.tokens_ST.dtype == np.int32
    assert found.tokens_ST.reshape(-1).tolist() == ids[:960]
    assert found.lengths_S.tolist() == [48] * 20
    assert (found.name, found.notes) == ("book.txt", ())


def test_chunks_begin_with_the_begin_token_in_place_of_their_first(
    begun: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = sequences(begun, written(tmp_path / "book.txt", BOOK), tokens=100, context=32)
    stream = [0, *tokenizer.encode(BOOK, add_special_tokens=False).ids]
    expected = [[0, *stream[start + 1 : start + 32]] for start in (0, 32, 64)]
    assert found.tokens_ST.tolist() == expected


def test_reading_only_a_beginning_changes_no_token(plain: Model, tmp_path: Path) -> None:
    """A long file, of which a little is read: equal to what a file of just enough text gives."""
    short = sequences(plain, written(tmp_path / "a.txt", BOOK), tokens=320, context=32)
    long = sequences(plain, written(tmp_path / "b.txt", BOOK * 400), tokens=320, context=32)
    assert np.array_equal(short.tokens_ST, long.tokens_ST)
    assert short.sha256 == long.sha256
    one_line = written(tmp_path / "c.txt", BOOK.replace("\n", " 我们数了 ") * 200)
    found = sequences(plain, one_line, tokens=320, context=32)
    with Vocabulary(plain) as vocabulary:
        ids = vocabulary.tokenize(one_line.read_text("utf-8")[:20_000])
    assert found.tokens_ST.reshape(-1).tolist() == ids[:320]


def test_hash_covers_the_ids_that_are_used(plain: Model, tmp_path: Path) -> None:
    found = sequences(plain, written(tmp_path / "book.txt", BOOK), tokens=96, context=48)
    raw = b"".join(struct.pack("<i48i", 48, *row) for row in found.tokens_ST.tolist())
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    longer = sequences(plain, tmp_path / "book.txt", tokens=144, context=48)
    assert longer.sha256 != found.sha256


def test_fewer_tokens_than_asked_for_are_a_note(plain: Model, tmp_path: Path) -> None:
    found = sequences(plain, written(tmp_path / "book.txt", TEXT), tokens=100_000, context=32)
    assert 3 < len(found.tokens_ST) < 100
    assert found.notes == (f"book.txt fills {len(found.tokens_ST)} sequences of 32 tokens, not the 3125 asked for.",)


def test_spare_sequences_are_those_that_follow(plain: Model, begun: Model, tmp_path: Path) -> None:
    """What is run stays the same; what is spare is what more tokens would have taken, as far as it goes."""
    (tmp_path / "book.txt").write_text(BOOK)
    lines = [json.dumps({"text": BOOK[at : at + 90]}) for at in range(0, len(BOOK), 90)]
    (tmp_path / "book.jsonl").write_text("\n".join(lines))
    for model, name in ((plain, "book.txt"), (begun, "book.jsonl")):
        alone = sequences(model, tmp_path / name, tokens=96, context=32)
        with_spare = sequences(model, tmp_path / name, tokens=96, context=32, spare=2)
        more = sequences(model, tmp_path / name, tokens=160, context=32)
        assert alone.spare == () and with_spare.sha256 == alone.sha256 and with_spare.notes == alone.notes == ()
        assert 63 <= sum(map(len, with_spare.spare)) <= 64  # of one token alone nothing can be scored
        if name == "book.txt":
            assert [list(row) for row in with_spare.spare] == more.tokens_ST[3:].tolist()
        else:  # a record that is cut where the tokens end is not gone on with
            assert all(row[0] == begun_token(begun) for row in with_spare.spare)
    (tmp_path / "short.txt").write_text(BOOK[:500])
    short = sequences(plain, tmp_path / "short.txt", tokens=96, context=32, spare=50)
    assert 0 < len(short.spare) < 50 and short.notes == ()


def begun_token(model: Model) -> int:
    return int(model.metadata["tokenizer.ggml.bos_token_id"].value)


def test_each_record_is_a_sequence_of_its_own(begun: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = TEXT[:300]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    records = [{"text": "Two boats."}, {"text": long}, {"messages": messages}]
    lines = "\n\n".join(json.dumps(record) for record in records)
    found = sequences(begun, written(tmp_path / "data.jsonl", lines), tokens=4000, context=64)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    whole = [0, *ids(long)]
    assert len(whole) > 64
    cut = [whole[at : at + 64] for at in range(0, len(whole), 64)]
    cut = [[0, *piece[1:]] for piece in cut]
    talk = [0, *ids("<|user|>\nWhy?"), 1, *ids("\n<|assistant|>\nBecause.")]
    expected = [[0, *ids("Two boats.")], *cut, talk]
    rows = [row[:length].tolist() for row, length in zip(found.tokens_ST, found.lengths_S, strict=True)]
    assert rows == expected
    assert all((row[length:] == 0).all() for row, length in zip(found.tokens_ST, found.lengths_S, strict=True))


def test_prompt_and_response_equal_messages(begun: Model, tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "Why is it so?", "response": "Because."})
    messages = [{"role": "user", "content": "Why is it so?"}, {"role": "assistant", "content": "Because."}]
    a = sequences(begun, written(tmp_path / "a.jsonl", (pair + "\n") * 8), tokens=64, context=16)
    talk = json.dumps({"messages": messages})
    b = sequences(begun, written(tmp_path / "b.jsonl", (talk + "\n") * 8), tokens=64, context=16)
    assert a.sha256 == b.sha256
    assert a.tokens == 64


def test_conversations_without_a_template_are_plain_text_and_said_so(plain: Model, tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "Why is it so?", "response": "Because the boats are out."})
    found = sequences(plain, written(tmp_path / "a.jsonl", pair + "\n" + pair), tokens=20, context=8)
    assert any("no chat template" in note for note in found.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is not JSON"),
        ('{"txt": "a"}', "line 2: holds no text"),
        ('{"messages": []}', "line 2: holds no text"),
        ('{"messages": [{"role": "user"}]}', "line 2: holds no text"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("17", "line 2: holds no text"),
    ],
)
def test_bad_record_is_named_by_its_line(plain: Model, tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path / "data.jsonl", json.dumps({"text": "Two boats."}) + "\n" + line)
    with pytest.raises(SourceError, match=said):
        sequences(plain, path, tokens=500, context=32)


def test_errors_name_the_thing_and_the_way_out(plain: Model, tmp_path: Path) -> None:
    empty, short = written(tmp_path / "empty.txt", ""), written(tmp_path / "short.txt", "Two boats.")
    binary = tmp_path / "latin.txt"
    binary.write_bytes("Fünf Boote".encode("latin-1") * 100)
    cases: list[tuple[Path | str, int, int, type[DitherError], str]] = [
        (empty, 64, 32, UsageError, "empty.txt: is empty"),
        (short, 64, 32, UsageError, r"short.txt: holds \d+ tokens, and one sequence needs 32"),
        (binary, 64, 32, SourceError, "not UTF-8"),
        (tmp_path / "none.txt", 64, 32, SourceError, "no such file"),
        (tmp_path, 64, 32, SourceError, "is a folder"),
        (short, 640, 65, UsageError, "longer than .*64"),
        (short, 16, 32, UsageError, "16 tokens: do not fill one sequence of 32"),
        (short, 16, 1, UsageError, "too short"),
    ]
    for data, tokens, context, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            sequences(plain, data, tokens=tokens, context=context)
        assert caught.value.way_out


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the library is installed")
def test_hub_data_without_the_library_says_how_to_get_it(plain: Model) -> None:
    with pytest.raises(UsageError, match="pip install datasets"):
        sequences(plain, "hf:org/name", tokens=64, context=32)


def test_padding_and_pieces() -> None:
    packed = pack([[5, 6, 7], [8]], "x", 0)
    assert packed.tokens_ST.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert packed.tokens == 4
    assert packed.sha256 == hashlib.sha256(struct.pack("<6i", 3, 5, 6, 7, 1, 8)).hexdigest()
    assert pieces([1, 2, 3, 4, 5], 3, None) == [[1, 2, 3], [4, 5]]
    assert pieces([1, 2, 3, 4, 5], 3, 9) == [[9, 1, 2], [9, 4, 5]]
    assert pieces([9, 1], 3, 9) == [[9, 1]]


def test_batches_cover_every_sequence_once() -> None:
    found = list(batches(np.array([10, 3, 10, 7, 1], np.int32), 25))
    assert [batch.tolist() for batch in found] == [[0, 1], [2, 3], [4]]
    assert [batch.tolist() for batch in batches(np.array([10, 10], np.int32), 5)] == [[0], [1]]
