"""Benchmarks of tiny models: what is kept, who takes turns, where joules and bytes come from."""

from __future__ import annotations

import json
import os
import stat
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from llama_util import TinyLlama
from typer.testing import CliRunner

import dither
from dither.cli import app
from dither.errors import DitherError, FormatError, OutputError, UnsupportedError, UsageError
from dither.running import benchmark, energy, memory
from dither.running.benchmark import Benchmark

STUB = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    given["-m"] = given["-m"].rpartition("/")[2]
    log.write(" ".join(given[key] for key in ("-m", "-p", "-n", "-t")) + "\\n")
calls = len(open({log!r}).readlines())
print(json.dumps([
    {{"n_prompt": int(given["-p"]), "n_gen": 0, "avg_ts": 100.0 + calls}},
    {{"n_prompt": 0, "n_gen": int(given["-n"]), "avg_ts": 10.0 + calls}},
]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        TinyLlama(seed=seed).write(folder / f"{name}.gguf")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Benchmark], list[str]]:
    """A benchmarked against b, with a llama-bench on the PATH that counts; and who it was asked about."""
    place = tmp_path_factory.mktemp("bin")
    log, program = place / "log", place / "llama-bench"
    program.write_text(STUB.format(python=sys.executable, log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
        results = dither.bench(
            folder / "a.gguf", against=folder / "b.gguf", threads=1, prompt=900, generate=8, repeats=3
        )
    return results, log.read_text().splitlines()


@pytest.mark.slow
def test_figures_are_the_median_the_least_and_the_most_of_the_rounds(found: tuple[list[Benchmark], list[str]]) -> None:
    a, b = found[0]
    for name, samples in (("decode", a.decode_samples), ("prefill", a.prefill_samples)):
        assert len(samples) == a.repeats == 3 and min(samples) > 0
        fields = [getattr(a, f"{name}_tokens_per_second{end}") for end in ("", "_low", "_high")]
        assert fields == [statistics.median(samples), min(samples), max(samples)]
    ratios = [ours / theirs for ours, theirs in zip(a.decode_samples, b.decode_samples, strict=True)]
    assert (a.decode_ratio, a.decode_ratio_low) == (statistics.median(ratios), min(ratios))
    assert a.against == "b.gguf" and b.against == "" and b.decode_ratio is None


@pytest.mark.slow
def test_files_take_turns_and_llama_bench_is_asked_about_the_same_work(
    found: tuple[list[Benchmark], list[str]],
) -> None:
    a, b = found[0]
    assert a.context == b.context == 128 and a.prompt_tokens == 120  # 900 do not fit beside 8 to come
    assert found[1] == ["a.gguf 120 8 1", "b.gguf 120 8 1"] * 3
    assert a.llama_bench_decode_tokens_per_second == 13.0  # the median of calls 1, 3 and 5
    assert b.llama_bench_prefill_tokens_per_second_high == 106.0


@pytest.mark.slow
def test_memory_is_of_a_process_that_holds_the_model_alone(found: tuple[list[Benchmark], list[str]]) -> None:
    for result in found[0]:
        assert result.peak_memory_bytes >= result.memory_before_load_bytes + result.file_bytes
        assert result.time_to_first_token_seconds > 0 and result.load_seconds > 0
        assert (result.joules_per_token is None) == ("not readable here" in result.energy_note)


@pytest.mark.slow
def test_results_are_kept_beside_the_files(
    folder: Path, found: tuple[list[Benchmark], list[str]], tmp_path: Path
) -> None:
    for result in found[0]:
        assert benchmark.load(folder / f"{result.file}.bench.json") == result
        now = (folder / result.file).stat()
        assert (result.file_bytes, result.file_modified_ns) == (now.st_size, now.st_mtime_ns)
    flat = json.loads((folder / "a.gguf.bench.json").read_text())
    assert not any(isinstance(value, dict) for value in flat.values())
    assert flat["command"] == "dither bench a.gguf --against b.gguf --threads 1 -c 0 -p 900 -n 8 -r 3"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no such model')", "failed with code 1 (no such model)"),
        ("print('tokens: many')", "something else"),
        ("print('[{}]')", "something else"),
        ("""print('[{"n_prompt": 4, "n_gen": 0, "avg_ts": "fast"}]')""", "something else"),
    ],
)
def test_a_llama_bench_that_fails_is_a_note_and_no_error(tmp_path: Path, program: str, reason: str) -> None:
    from dither.running import llama_bench

    script = tmp_path / "llama-bench"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    opinion, note = llama_bench.ask(str(script), tmp_path, prompt=4, generate=2, threads=1, gpu=False)
    assert opinion is None and reason in note


@pytest.mark.slow
def test_models_that_do_not_fit_together_are_loaded_for_their_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.running import bench as job
    from dither.running.worker import Worker

    alive, most = [0], [0]

    class Counted(Worker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def close(self) -> None:
            if self._process.poll() is None:
                alive[0] -= 1
            super().close()

    monkeypatch.setattr(job, "Worker", Counted)
    monkeypatch.setattr(job, "system_memory", lambda: (2**20, 2**10))
    found = dither.bench([folder / "a.gguf", folder / "b.gguf"], threads=1, prompt=8, generate=2, repeats=1, save=False)
    assert (alive[0], most[0]) == (0, 1) and len(found) == 2


@pytest.mark.slow
def test_the_command_prints_one_document_and_saves_nothing_unless_it_may(folder: Path) -> None:
    before = (folder / "a.gguf.bench.json").read_bytes() if (folder / "a.gguf.bench.json").exists() else None
    options = ["--threads", "1", "-p", "16", "-n", "4", "-r", "1", "--no-save", "--json"]
    result = CliRunner().invoke(app, ["bench", str(folder / "a.gguf"), *options], env={"PATH": ""})
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["prompt_tokens"] == 16 and document["repeats"] == 1
    assert document["llama_bench_note"] == "no llama-bench on the PATH"
    after = (folder / "a.gguf.bench.json").read_bytes() if (folder / "a.gguf.bench.json").exists() else None
    assert after == before


def test_requests_that_make_no_sense_are_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="dither convert"):
        dither.bench(checkpoint)
    with pytest.raises(UsageError, match="named twice"):
        dither.bench(folder / "a.gguf", against=folder / "a.gguf")
    with pytest.raises(UsageError, match="measures nothing"):
        dither.bench(folder / "a.gguf", generate=1)
    (tmp_path / "c.gguf").write_bytes((folder / "a.gguf").read_bytes())
    (tmp_path / "c.gguf.bench.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="no schema_version"):
        dither.bench(tmp_path / "c.gguf")


@pytest.mark.slow
def test_what_llama_cpp_refuses_is_told_in_its_words(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "a.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.replace(b"llama.block_count", b"llama.block_coun7"))
    with pytest.raises(DitherError, match="block_count"):
        dither.bench(broken, save=False, prompt=4, generate=2, repeats=1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{}", "no schema_version"),
        ('{"schema_version": 1}', "tool"),
        ('{"schema_version": 99}', "newer"),
        (" " * (2**20 + 1), "too large"),
    ],
)
def test_what_is_no_benchmark_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "x.bench.json"
    path.write_text(text)
    with pytest.raises((FormatError, UnsupportedError), match=reason):
        benchmark.load(path)


def counters(folder: Path, microjoules: int, name: str = "package-0") -> Path:
    for zone, title in (("intel-rapl:0", name), ("intel-rapl:0:0", "core")):
        (folder / zone).mkdir(parents=True, exist_ok=True)
        (folder / zone / "name").write_text(title + "\n")
        (folder / zone / "energy_uj").write_text(f"{microjoules}\n")
        (folder / zone / "max_energy_range_uj").write_text("262143328850\n")
    return folder


def test_joules_come_from_the_package_counter_over_its_turn(tmp_path: Path) -> None:
    meter = energy.EnergyMeter(counters(tmp_path, 262_143_000_000))
    before = meter.read()
    counters(tmp_path, 1_000_000)
    assert meter.between(before, meter.read()) == pytest.approx(1 + 0.328850)  # wrapped once; cores not twice
    assert "RAPL (1 package)" in meter.note and "not readable" not in meter.note


def test_where_nothing_counts_joules_the_reason_is_told(tmp_path: Path) -> None:
    pynvml = sys.modules.get("pynvml")
    assert pynvml is None or not energy.EnergyMeter(tmp_path).sources, "this test needs a machine without a card"
    for place, reason in ((tmp_path / "none", "shows no"), (tmp_path, "no processor package")):
        meter = energy.EnergyMeter(place)
        assert meter.note.startswith("not readable here: ") and reason in meter.note
        assert meter.between(meter.read(), meter.read()) is None
    folder = counters(tmp_path / "rapl", 5)
    (folder / "intel-rapl:0" / "energy_uj").unlink()
    assert "only root may read" in energy.EnergyMeter(folder).note


def test_cards_that_count_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVML answers: millijoules since the driver was loaded; an old card refuses."""

    class Refused(Exception):  # noqa: N818 — a stand-in for NVMLError
        pass

    counted = {0: 5_000, 1: 70_000}

    def energy_of(card: int) -> int:
        if card == 2:
            raise Refused
        return counted[card]

    nvml = types.SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=energy_of,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = energy.EnergyMeter(tmp_path)
    before = meter.read()
    counted[0], counted[1] = 6_500, 70_250
    assert meter.between(before, meter.read()) == pytest.approx(1.75)
    assert "NVML (2 cards)" in meter.note


def test_the_peak_is_what_the_system_accounts_to_the_process() -> None:
    pytest.importorskip("psutil")
    code = (
        "import psutil; from dither.running.memory import peak_bytes; x = bytearray(64 << 20); "
        "print(peak_bytes(), psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, systems = map(int, done.stdout.split())
    assert abs(ours - systems) <= 4 * 2**20 and ours > 64 * 2**20
    assert memory.peak_bytes(2**30) == 0  # no such process
