"""The job: files, their reference and a text go in, measurements come out, or an error before the work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dither
from conftest import SENTENCES, write_checkpoint
from dither.errors import FormatError, OutputError, SourceError, UsageError
from dither.formats.ggml import f32
from dither.measuring import schema
from dither.measuring.build import content_sha256
from dither.measuring.measure import compare, measure
from dither.models.source import open_model

pytestmark = pytest.mark.slow  # starts llama.cpp, which tokenizes

TOKENS, CONTEXT = 512, 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text("\n".join(f"{n}. {SENTENCES[n % len(SENTENCES)]}" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    made = {to: folder / f"{to}.gguf" for to in ("Q8_0", "Q4_K_M")}
    for to, path in made.items():
        dither.quantize(checkpoint, to, path)
    return made


@pytest.fixture
def copies(files: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {to: Path(shutil.copy(path, tmp_path)) for to, path in files.items()}


def test_measurements_say_what_was_measured(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    paths = [copies["Q4_K_M"], copies["Q8_0"], checkpoint]
    four, eight, itself = measure(paths, checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    (checkpoint.parent / f"{checkpoint.name}.measure.json").unlink()
    assert (four.type, eight.type) == ("Q4_K_M", "Q8_0")
    assert four.kl_mean_low < four.kl_mean < four.kl_mean_high
    assert 0 < 10 * eight.kl_mean_high < four.kl_mean_low
    assert itself.kl_max == itself.delta_p_rms == itself.kl_mean_high == 0.0
    assert itself.ppl_ratio == itself.same_top == 1.0
    for path, found in ((copies["Q4_K_M"], four), (copies["Q8_0"], eight)):
        assert schema.load(schema.path_for(path)) == found
        looked = dither.inspect(path)
        assert (found.bytes, found.bpw) == (looked.bytes, looked.bits_per_weight)
        assert found.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.reference_sha256 == itself.file_sha256
        assert (found.sequences, found.tokens) == (8, 8 * (CONTEXT // 2 - 1))  # of 64: positions 32 to 62
        assert (found.file, found.reference, found.data) == (path.name, checkpoint.name, text.name)
        assert found.ppl / found.ppl_reference == pytest.approx(found.ppl_ratio)
        assert np.average(found.sequence_kl, weights=found.sequence_tokens) == pytest.approx(found.kl_mean)
        assert len(found.drift) == 2
        assert str(path.parent) not in schema.path_for(path).read_text()  # nothing of the machine


def test_compare_uses_what_is_kept_and_the_limit_holds(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    options = {"tokens": TOKENS, "context": CONTEXT}
    a, b = copies["Q8_0"], copies["Q4_K_M"]
    first = compare(checkpoint, b, data=text, max_kld=1e-6, **options)
    assert (first.a, first.passed) == (None, False)
    again = compare(checkpoint, b, max_kld=first.b.kl_mean)  # kept beside the file; the limit is inclusive
    assert (again.b, again.passed) == (first.b, True)
    with pytest.raises(UsageError, match=r"was measured against"):
        compare(a, b)  # is A the original of B, or a file not measured yet?
    measure([a], checkpoint, data=text, save=True, **options)
    found = compare(a, b)
    assert found.a is not None and found.difference is not None
    assert found.verdict == "higher"
    assert found.overlap is False
    assert found.difference.value == pytest.approx(found.b.kl_mean - found.a.kl_mean)
    assert found.difference.low > 0
    assert compare(schema.path_for(b), schema.path_for(a)).verdict == "lower"
    assert compare(a, a).verdict == "same"


def test_a_changed_file_has_no_measurement(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    path = copies["Q8_0"]
    measure([path], checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    shutil.copy(copies["Q4_K_M"], path)
    with pytest.raises(UsageError, match="has no measurement"):
        compare(schema.path_for(path), path)


def test_other_terms_are_not_compared(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    measure([copies["Q8_0"]], checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    measure([copies["Q4_K_M"]], checkpoint, data=text, tokens=TOKENS, context=CONTEXT, skip=0)
    found = compare(copies["Q8_0"], copies["Q4_K_M"])
    assert (found.verdict, found.overlap, found.difference) == ("", None, None)
    assert "positions" in found.notes[0]


def test_few_sequences_are_said(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    (found,) = measure([copies["Q8_0"]], checkpoint, data=text, tokens=128, context=64, save=False)
    assert "Intervals over 2 sequences mean little" in found.notes[-2]
    assert "A thin proof, 62 tokens scored" in found.notes[-1] and found.thin
    assert not schema.path_for(copies["Q8_0"]).exists()


def test_what_runs_otherwise_is_said(checkpoint: Path, copies: dict[str, Path], text: Path) -> None:
    """A file whose rope base is wrong runs by its own: the damage is measured, and named."""
    model = open_model(copies["Q8_0"])
    wrong = replace(model, metadata={**model.metadata, "llama.rope.freq_base": f32(500.0)})
    options = {"data": text, "tokens": TOKENS, "context": CONTEXT, "save": False}
    (right,) = measure([model], checkpoint, **options)
    (found,) = measure([wrong], checkpoint, **options)
    assert any("llama.rope.freq_base is 500.0 here and 10000.0" in note for note in found.notes)
    assert found.kl_mean > 3 * right.kl_mean


def other_width(folder: Path, checkpoint: Path) -> Path:
    return write_checkpoint(folder / "wide", hidden=320)


def other_depth(folder: Path, checkpoint: Path) -> Path:
    return write_checkpoint(folder / "deep", layers=3)


def other_words(folder: Path, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, folder / "words")
    tokenizer = json.loads((folder / "words" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "words" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder / "words"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_width, "token_embd.weight|attn_k.weight"),
        (other_depth, "the reference has no blk.2"),
        (other_words, "another vocabulary: it calls token"),
    ],
)
def test_another_model_is_refused(
    checkpoint: Path, tmp_path: Path, text: Path, make: Callable[[Path, Path], Path], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        measure([make(tmp_path, checkpoint)], checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    assert not list(tmp_path.glob("*.json"))


def test_bad_requests_are_refused_before_the_work(
    checkpoint: Path, copies: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    path = copies["Q8_0"]
    (tmp_path / "short.txt").write_text("Too short.")
    for data, options, kind, said in (
        (text, {"context": 256}, UsageError, "longer than"),
        (tmp_path / "none.txt", {}, SourceError, "no such file"),
        (tmp_path / "short.txt", {}, UsageError, "one sequence needs 64"),
        (text, {"skip": 63}, UsageError, "no position to score"),
        (text, {"device": "cuda:77"}, UsageError, "device"),
    ):
        with pytest.raises(kind, match=said):
            measure([path], checkpoint, data=data, **{"tokens": TOKENS, "context": CONTEXT, **options})
    with pytest.raises(UsageError, match="no file"):
        measure([], checkpoint)
    with pytest.raises(UsageError, match="named twice"):
        measure([path, path], checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    schema.path_for(path).write_text("somebody else's")
    with pytest.raises(OutputError, match="no measurement"):
        measure([path], checkpoint, data=text, tokens=TOKENS, context=CONTEXT)
    with pytest.raises(FormatError, match="no JSON"):
        compare(path, path)
    assert schema.path_for(path).read_text() == "somebody else's"


def test_one_file_hashes_as_sha256sum_and_several_by_each(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    model = open_model(checkpoint)
    assert content_sha256(model) == hashlib.sha256(weights.read_bytes()).hexdigest()
    parts = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    split = replace(model, files=tuple(map(str, reversed(parts))))
    for second in (b"2", b"3"):
        for path, content in zip(parts, (b"1", second), strict=True):
            path.write_bytes(content)
        own = "\n".join(hashlib.sha256(content).hexdigest() for content in (b"1", second))
        assert content_sha256(split) == hashlib.sha256(own.encode()).hexdigest()
