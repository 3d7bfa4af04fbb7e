"""Answers are recorded as both models gave them, agree with another engine, and are read with suspicion."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import dither
from conftest import BUNDLED
from dither.cli import app
from dither.engines.llamacpp import LlamaCpp
from dither.errors import FormatError, OutputError, SourceError, UnsupportedError, UsageError
from dither.reporting import answer_records as records, answers as job
from dither.reporting.answer_records import Answer, Forced, ForcedToken, Recorded, Side, load, parse, path_for, save

TEXT = "The old man was quiet, and the boat was empty before the winter."


@pytest.fixture
def recorded() -> Recorded:
    side = Side(tokens=("A", " b"), seconds=0.5)
    token = ForcedToken(text="a", kl=0.25, top_original=(("x", 0.5),), top_quantized=(("y", 0.5),), same_top=False)
    return Recorded(
        file="a.gguf",
        reference="a",
        notes=("n",),
        answers=(Answer(prompt="p", original=side, quantized=side),),
        forced=(Forced(text="a", tokens=(token,)),),
    )


def test_doctests() -> None:
    assert doctest.testmod(records).failed == 0


def test_what_is_saved_is_read(recorded: Recorded, tmp_path: Path) -> None:
    path = path_for(tmp_path / "a.gguf")
    save(recorded, path)
    assert load(path) == recorded and [each.name for each in tmp_path.iterdir()] == ["a.gguf.answers.json"]


def broken(change: Callable[[dict], object]) -> Callable[[Recorded], str]:
    def apply(recorded: Recorded) -> str:
        document = recorded.model_dump(mode="json")
        change(document)
        return json.dumps(document)

    return apply


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: "[" * 100_000, "no JSON"),
        (lambda _: "[]", "schema_version"),
        (broken(lambda d: d.update(schema_version=True)), "schema_version"),
        (broken(lambda d: d["answers"][0]["original"].update(seconds=float("nan"))), "seconds"),
        (broken(lambda d: d["forced"][0]["tokens"][0].update(kl=float("inf"))), "kl"),
        (broken(lambda d: d["forced"][0]["tokens"][0].update(top_original=[["x", 2.0]])), "top_original"),
        (broken(lambda d: d["answers"][0]["original"].update(tokens=["a"] * 5000)), "tokens"),
        (broken(lambda d: d["answers"][0].update(prompt="x" * 70_000)), "prompt"),
        (broken(lambda d: d.update(answers=d["answers"] * 300)), "answers"),
        (broken(lambda d: d.update(file={"a": 1})), "file"),
    ],
)
def test_a_hostile_file_is_refused(make: Callable[[Recorded], str], reason: str, recorded: Recorded) -> None:
    with pytest.raises(FormatError, match=reason):
        parse(make(recorded), "a.answers.json")


def test_a_newer_or_a_foreign_file_stays_as_it_is(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="newer"):
        parse(json.dumps({"schema_version": 2}), "a")
    with pytest.raises(SourceError, match="No such file"):
        load(tmp_path / "none")
    place = tmp_path / "a.answers.json"
    place.write_text("mine")
    with pytest.raises(OutputError, match="no JSON"):
        records.check_writable(place)


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "two.gguf"
    dither.quantize(BUNDLED, "Q2_K", path)
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "half.gguf"
    dither.quantize(BUNDLED, "F16", path)
    return path


@pytest.mark.slow
def test_both_sides_answer_as_the_engine_alone_does(two_bits: Path, half: Path, tmp_path: Path) -> None:
    with job.Sides(BUNDLED, two_bits, folder=tmp_path, context=256) as sides:
        events = list(sides.stream("The old man", 24))
        assert sides.notes and "F16" in sides.notes[0]
    answer = Answer.model_validate(events[-1]["answer"])
    for side, path in (("original", half), ("quantized", two_bits)):
        with LlamaCpp(path, context=256) as engine:
            alone = list(engine.generate("The old man", max_tokens=24, temperature=0.0))
        assert list(getattr(answer, side).tokens) == alone
        assert [event["text"] for event in events if event.get("side") == side] == alone
    apart = answer.first_divergence
    assert apart is not None
    assert answer.original.tokens[:apart] == answer.quantized.tokens[:apart]
    assert answer.original.tokens[apart] != answer.quantized.tokens[apart]
    kinds = [event.get("side") for event in events[:6]]
    assert kinds == ["original", "quantized"] * 3  # side by side, not one after the other


@pytest.mark.slow
def test_reading_agrees_with_another_engine(two_bits: Path, half: Path) -> None:
    found = job.forced(two_bits, BUNDLED, TEXT)
    assert "".join(token.text for token in found.tokens).strip() == TEXT
    last, expected = found.tokens[-1], []
    with LlamaCpp(half, context=256) as before, LlamaCpp(two_bits, context=256) as after:
        ids = before.tokenize(TEXT, add_special=True)
        for end in range(-4, 0):
            p, q = (engine.next_token_probabilities(ids[:end]).astype(np.float64) for engine in (before, after))
            expected.append(float(np.sum(p * (np.log(p) - np.log(q)))))
        likeliest = [before.detokenize([int(token)]).strip() for token in np.argsort(-p)[:3]]
    # llama.cpp rounds what goes into a layer to eight bits: a few per cent of a divergence at one position.
    assert [token.kl for token in found.tokens[-4:]] == pytest.approx(expected, rel=0.08)
    assert sum(token.kl or 0.0 for token in found.tokens[-4:]) == pytest.approx(sum(expected), rel=0.03)
    assert [word.strip() for word, _ in last.top_original[:3]] == likeliest
    assert last.top_original[0][1] == pytest.approx(p.max(), rel=0.02)
    assert last.same_top == (p.argmax() == q.argmax())
    itself = job.forced(BUNDLED, BUNDLED, TEXT)
    assert max(token.kl or 0.0 for token in itself.tokens) == 0.0


@pytest.mark.slow
def test_the_command_records_beside_the_file(two_bits: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["answers", str(two_bits), "--against", str(BUNDLED), "-p", "Once", "-n", "8"]
    result = CliRunner().invoke(app, [*command, "--text", str(text), "--json"])
    assert result.exit_code == 0, result.output
    kept = load(path_for(two_bits))
    assert json.loads(result.stdout) == kept.model_dump(mode="json")
    assert kept.answers[0].prompt == "Once" and len(kept.answers[0].quantized.tokens) == 8
    assert kept.forced[0].text == TEXT and kept.reference == "demo_model"


def test_what_cannot_be_asked_is_said_before_any_work(tmp_path: Path, checkpoint: Path) -> None:
    for asked in ({"prompts": [" "]}, {"prompts": ["x" * 20_000]}, {"max_tokens": 0}, {"text": ""}):
        with pytest.raises(UsageError):
            job.answers(BUNDLED, BUNDLED, save=False, **asked)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="vocabulary"):
        job.Sides(BUNDLED, checkpoint)
