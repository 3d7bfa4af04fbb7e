"""Benchmarks in the results document: what was timed, and whether it still belongs to the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dither.reporting.document import Document
from dither.reporting.report import document
from dither.running.benchmark import Benchmark, path_for, save, spread


def benchmark(path: Path, **changed: object) -> Benchmark:
    status = path.stat()
    fields = {
        "tool": "dither",
        "engine": "llama.cpp",
        "command": f"dither bench {path.name}",
        "file": path.name,
        "file_bytes": status.st_size,
        "file_modified_ns": status.st_mtime_ns,
        "cpu": "<b>fast</b>",
        "cores": 4,
        "threads": 2,
        "context": 512,
        "prompt_tokens": 448,
        "generated_tokens": 64,
        "repeats": 3,
        "prefill_tokens_per_second": spread([900.0, 1000.0, 1100.0]),
        "decode_tokens_per_second": spread([90.0, 100.0, 110.0]),
        "engine_decode_tokens_per_second": spread([91.0, 101.0, 111.0]),
        "time_to_first_token_seconds": spread([0.1, 0.2, 0.3]),
        "load_seconds": 0.5,
        "peak_memory_bytes": 2**26,
        "memory_before_load_bytes": 2**24,
        "energy_note": "not readable here",
    }
    return Benchmark.model_validate({**fields, **changed})


@pytest.fixture
def file(tmp_path: Path, shelf: Path) -> Path:
    source = next(shelf.glob("*.gguf"))
    target = tmp_path / source.name
    target.write_bytes(source.read_bytes())
    return target


def shown(file: Path) -> Document:
    return document([file], fit=False)


def test_what_was_timed_is_shown(file: Path) -> None:
    save(benchmark(file), path_for(file))
    made = shown(file).to_json()
    (entry,), (run,) = made["speed"], made["runs"]
    assert entry["run"] == run["id"]
    assert entry["decode"] == {"value": 100.0, "low": 90.0, "high": 110.0}
    assert entry["prefill"]["value"] == 1000.0
    assert entry["joules_per_token"] is None and entry["joules_note"] == "not readable here"
    assert entry["machine"] == "<b>fast</b>"  # as text: the page never parses it
    assert run["metrics"]["decode_tokens_per_second"]["tag"] == "measured"
    assert run["metrics"]["peak_memory_bytes"]["value"] == 2**26
    assert "timed" not in run


def test_energy_is_shown_where_it_was_read(file: Path) -> None:
    save(benchmark(file, joules_per_token=spread([1.0, 2.0, 3.0])), path_for(file))
    assert shown(file).runs[0].metrics["joules_per_token"].value == 2.0


def test_a_benchmark_of_another_file_is_not_shown(file: Path) -> None:
    save(benchmark(file, file_bytes=5), path_for(file))
    made = shown(file)
    assert not made.speed
    assert any("Stale" in note and "dither bench" in note for note in made.runs[0].notes)


def test_a_copy_says_that_it_is_one(file: Path) -> None:
    save(benchmark(file), path_for(file))
    os.utime(file, ns=(1, 1))
    made = shown(file)
    assert made.speed and any("written or copied" in note for note in made.runs[0].notes)


def test_what_is_no_benchmark_is_a_problem(file: Path) -> None:
    path_for(file).write_text('{"schema_version": 1, "cpu": 7}')
    made = shown(file)
    assert not made.speed and "is no benchmark" in made.problems[0].reason
