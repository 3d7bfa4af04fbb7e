"""What the commands print for a person: the figures that are in the results, and nobody's markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_util import TinyLlama
from typer.testing import CliRunner

from dither.cli import app
from dither.cli.bench import show as show_benchmarks
from dither.cli.tasks import show as show_scores
from dither.formats.ggml import string
from dither.models.source import open_model
from dither.running import hub_upload
from dither.running.benchmark import Benchmark, spread
from dither.running.ollama import describe, pieces_of
from dither.running.paired_difference import Difference
from dither.running.tasks import Score, Scores


def benchmark(**fields: object) -> Benchmark:
    known: dict[str, object] = {
        "tool": "dither",
        "engine": "llama.cpp",
        "command": "dither bench",
        "file": "a[bold].gguf",
        "file_bytes": 1,
        "file_modified_ns": 1,
        "cpu": "some CPU",
        "cores": 2,
        "threads": 2,
        "context": 512,
        "prompt_tokens": 64,
        "generated_tokens": 8,
        "repeats": 3,
        "load_seconds": 0.25,
        "peak_memory_bytes": 3 * 2**20,
        "memory_before_load_bytes": 2**20,
        "energy_note": "not readable here: no counter",
        "llama_bench_note": "no llama-bench on the PATH",
        "prefill_tokens_per_second": spread([90.0, 100.0, 110.0]),
        "decode_tokens_per_second": spread([19.0, 19.8, 20.0]),
        "engine_decode_tokens_per_second": spread([20.0, 20.0, 20.0]),
        "time_to_first_token_seconds": spread([0.5, 0.5, 0.5]),
    }
    return Benchmark.model_validate(known | fields)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_benchmark_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmarks([benchmark()])
    told = printed(capsys)
    assert "a[bold].gguf" in told and "19.8 (19.0–20.0)" in told.replace("\n", " ")
    assert "500 ms" in told and "3.00 MiB" in told and "Energy: not readable here: no counter." in told
    assert "own clock says 20.0 t/s written, of which 99.0 % arrive here; no llama-bench on the PATH." in told


def test_one_of_a_thing_is_not_several(capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmarks([benchmark(repeats=1, threads=1, prompt_tokens=1)])
    told = printed(capsys)
    assert "per second, of one round; 1 token read, 8 written, 1 thread on some CPU." in told


def test_a_ratio_and_a_second_opinion_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "against": "b.gguf",
        "prefill_ratio": spread([1.5, 2.0, 2.5]),
        "decode_ratio": spread([0.9, 1.1, 1.2]),
        "llama_bench_decode_tokens_per_second": spread([22.0]),
        "joules_per_token": spread([1.234]),
    }
    show_benchmarks([benchmark(**fields)])
    told = printed(capsys)
    assert "reads ×2.00 (1.50–2.50) and writes ×1.10 (0.90–1.20) as fast as b.gguf." in told
    assert "llama-bench 22.0 t/s, of which 90.0 %." in told and "1.23" in told


def test_scores_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    scores = (
        Score("arc", "acc", "none", 0.5, 0.01, 400, 0.55, Difference(-0.05, 0.02, 400, 30)),
        Score("arc", "ppl", "strict", 7.0, None, 400, None, None),
    )
    show_scores(Scores("a.gguf", "b", scores, 400))
    told = printed(capsys)
    assert "0.5000 ± 0.0100 0.5500 -0.0500 ± 0.0200*" in told  # beyond chance
    assert "ppl (strict) 7.0000 – –" in told and "400 questions of each task at most" in told
    one = Score("arc", "acc", "none", 1.0, None, 1, None, None)
    show_scores(Scores("a.gguf", "", (one,), None))
    assert "one standard error; 1 question." in printed(capsys)


def test_an_export_in_words(tmp_path: Path) -> None:
    model = TinyLlama().write(tmp_path / "m.gguf")
    for options, words in (
        (["--lmstudio", str(tmp_path / "lm")], "linked in"),
        (["--hf", "me/model"], "would go to me/model"),
        (["--ollama", str(tmp_path / "ol")], "ollama create m -f"),
    ):
        result = CliRunner().invoke(app, ["export", str(model), *options])
        assert result.exit_code == 0 and words in " ".join(result.stdout.split()), result.output
    for options, words in (([], "needs one of"), (["--ollama", "x", "--yes"], "goes with --hf alone")):
        result = CliRunner().invoke(app, ["export", str(model), *options])
        assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_a_card_takes_no_markup_from_the_file(tmp_path: Path) -> None:
    model = open_model(TinyLlama().write(tmp_path / "m.gguf"))
    hostile = 'x | y\n---\n<script>`"'
    metadata = {**model.metadata, "general.name": string(hostile), "general.license": string('a"\nb: c')}
    card = hub_upload.card(type(model)(**{**model.__dict__, "metadata": metadata}), "me/model")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert 'license: "a\\"\\nb: c"' in head.splitlines() and "<script>" not in body
    assert len([line for line in body.splitlines() if line.startswith("| made from")]) == 1


def test_a_template_that_would_end_the_modelfiles_quotes_is_left_out() -> None:
    def apply(messages: object) -> str:
        assert isinstance(messages, list)
        return "".join(f'"""{message["role"]}: {message["content"]}\n' for message in messages)

    assert pieces_of(apply)[0] is not None
    told = describe("m.gguf", "llama", {}, apply)
    assert told.template is None and "quotes" in told.notes[0] and '"""' not in told.modelfile()
