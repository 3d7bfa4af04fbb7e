"""Finding runs: against what other readers say of the same files, and among what nobody should trust."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from shelf_util import measured, save
from typer.testing import CliRunner

import dither
from dither.cli import app
from dither.formats.ggml import string
from dither.formats.gguf import lay_out
from dither.measuring import schema
from dither.reporting import runs as runs_module, tensors
from dither.reporting.discover import find
from dither.reporting.frontier import points, sentence
from dither.reporting.recipes import command, in_words, measure_command
from dither.reporting.tensors import place_of


@pytest.fixture
def one(shelf: Path, tmp_path: Path) -> Path:
    """A copy of one file and its measurement, to be spoilt."""
    for name in ("tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf.measure.json"):
        shutil.copy2(shelf / name, tmp_path / name)
    return tmp_path / "tiny-Q4_K_M.gguf"


def test_everything_on_a_shelf_is_found(shelf: Path) -> None:
    found = find([shelf])
    assert not found.problems
    assert [run.type for run in found.runs] == ["Q8_0", "int4-g128", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    assert [run.bytes for run in found.runs] == sorted((run.bytes for run in found.runs), reverse=True)
    assert {run.type: run.metric("kl_mean") for run in found.runs} == {
        "Q8_0": 0.0004,
        "int4-g128": 0.02,
        "Q5_K_M": 0.004,
        "Q4_K_M": 0.03,
        "Q3_K_M": None,
        "Q2_K": 0.4,
    }
    assert [run.container for run in found.runs].count("gptq") == 1
    assert len({run.id for run in found.runs}) == 6
    assert found.runs == find([shelf, *sorted(shelf.iterdir())]).runs  # named twice, shown once
    delta = found.runs[0].metrics["delta_ppl"]
    assert (delta.value, delta.low, delta.high) == pytest.approx((0.5, 0.4, 0.6))


def test_the_original_is_found_by_its_name_in_the_folder_above(shelf: Path) -> None:
    reference = find([shelf]).reference
    assert reference is not None
    assert (reference.name, reference.architecture) == ("tiny-llama", "llama")
    stored = load_file(shelf.parent / "tiny-llama" / "model.safetensors")
    assert reference.parameters == sum(array.size for array in stored.values())
    assert reference.bytes == sum(file.stat().st_size for file in (shelf.parent / "tiny-llama").iterdir())
    assert reference.path == str(shelf.parent / "tiny-llama")


def test_tensors_are_those_that_another_reader_sees(shelf: Path) -> None:
    found = {run.file: run for run in find([shelf]).runs}
    for name, run in found.items():
        if not name.endswith(".gguf"):
            continue
        theirs = {t.name: t for t in gguf.GGUFReader(shelf / name).tensors}
        assert {row.name: (row.type, row.bytes, row.shape) for row in run.tensors} == {
            key: (t.tensor_type.name, t.n_bytes, tuple(int(n) for n in reversed(t.shape))) for key, t in theirs.items()
        }
        assert run.tensor_bytes == sum(t.n_bytes for t in theirs.values())
        assert run.bytes == (shelf / name).stat().st_size
        assert sum(size for _, _, size in run.mixed) == run.tensor_bytes


def test_the_errors_a_file_keeps_are_the_real_ones(shelf: Path) -> None:
    stored = load_file(shelf.parent / "tiny-llama" / "model.safetensors")
    rows = {row.name: row for row in find([shelf / "tiny-Q4_K_M.gguf"]).runs[0].tensors}
    for tensor in gguf.GGUFReader(shelf / "tiny-Q4_K_M.gguf").tensors:
        layer, kind = place_of(tensor.name)
        if kind != "ffn_down":
            continue
        w_RC = stored[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float64)
        v_RC = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        wanted = np.linalg.norm(w_RC - v_RC) / np.linalg.norm(w_RC)
        assert rows[tensor.name].relative_error == pytest.approx(wanted, rel=1e-5)
        assert rows[tensor.name].error_tag == "measured"
        assert (rows[tensor.name].layer, rows[tensor.name].kind) == (layer, "ffn_down")


def test_a_folder_keeps_the_same_errors(shelf: Path) -> None:
    from dither.reporting.report import document

    kept = find([shelf / "tiny-gptq"]).runs[0]
    about = shelf / "tiny-gptq" / "dither.json"
    text = about.read_text()
    try:
        bare = {key: value for key, value in json.loads(text).items() if key != "relative_errors"}
        about.write_text(json.dumps(bare))
        assert {row.relative_error for row in find([shelf / "tiny-gptq"]).runs[0].tensors} == {None}
        counted = document([shelf / "tiny-gptq"], compare=True, fit=False).runs[0]
    finally:
        about.write_text(text)
    errors = {row.name: row.relative_error for row in kept.tensors}
    for row in counted.tensors:
        assert row.relative_error == pytest.approx(errors[row.name], rel=1e-4, abs=1e-7), row.name


def test_errors_of_some_rows_are_marked_as_estimates(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dither.models.source import open_model

    run = find([shelf / "tiny-Q2_K.gguf"]).runs[0]
    bare = [row.model_copy(update={"relative_error": None, "error_tag": None}) for row in run.tensors]
    monkeypatch.setattr(tensors, "SAMPLED_WEIGHTS", 40 * 256)
    found = tensors.with_errors(bare, open_model(shelf / "tiny-Q2_K.gguf"), open_model(shelf.parent / "tiny-llama"))
    for row, kept in zip(found, run.tensors, strict=True):
        assert row.relative_error == pytest.approx(kept.relative_error, rel=0.2, abs=1e-6)
    assert {row.error_tag for row in found if row.kind == "ffn_up"} == {"estimated"}


def test_the_command_of_a_file_makes_it_again(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shelf.parent / "tiny-llama", tmp_path / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    odd = dither.quantize(
        "tiny-llama",
        "Q3_K_M",
        "odd one.gguf",
        tensors=[("ffn_down|attn_v", "Q8_0")],
        embedding_type="Q4_K",
        solver="half-quadratic",
    )
    (tmp_path / "kept").mkdir()
    shutil.move(odd.path, "kept/odd one.gguf")
    for place in (shelf / "tiny-Q5_K_M.gguf", tmp_path / "kept" / "odd one.gguf", shelf / "tiny-gptq"):
        run = find([place]).runs[0]
        assert run.command is not None
        words = shlex.split(run.command)
        assert words[0] == "dither"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
        again = tmp_path / place.name
        if place.is_dir():
            again, place = again / "model.safetensors", place / "model.safetensors"
        assert again.read_bytes() == place.read_bytes()


def test_commands_name_evidence_and_the_text_it_came_from() -> None:
    data = {"name": "my text.txt", "sha256": "x", "seed": 0, "tokens": 4096, "context": 256}
    recipe = {
        "to": "Q4_K_M",
        "solver": "gptq",
        "source": {"name": "m", "kind": "safetensors"},
        "transforms": {"awq": {}},
        "evidence": {"data": data, "sha256": "y", "gradients": True},
    }
    assert command(recipe, "-a b.gguf", "org/m") == (
        "dither calibrate org/m --tokens 4096 -c 256 --data 'my text.txt' --gradients -o evidence && "
        "dither quantize org/m --to Q4_K_M --evidence evidence --solver gptq --transform awq -o './-a b.gguf'"
    )
    assert in_words(recipe) == "gptq, calibrated with gradients, awq"
    for unknown in ({"plan": "ab"}, {"dtype": "F16"}, {"source": None}, {"evidence": {}}, {"tensors": ["x"]}):
        assert command({**recipe, **unknown}, "a.gguf") is None


def test_a_measurement_says_how_to_measure_again(shelf: Path) -> None:
    found = measured(shelf / "tiny-Q2_K.gguf")
    assert measure_command(found) == (
        "dither measure tiny-Q2_K.gguf --against tiny-llama --data novel.txt --tokens 2048 -c 128"
    )
    held = found.model_copy(update={"data": "held back from x"})
    assert measure_command(held) is None
    assert measure_command(found.model_copy(update={"data": "self (seed 5)"})) is None


def test_one_sequence_draws_no_interval(one: Path) -> None:
    """Also where an earlier version wrote the figure itself for both ends."""
    save(one, 0.03, sequences=1, kl_mean_low=0.03, kl_mean_high=0.03)
    (run,) = find([one.parent]).runs
    assert {(key, metric.low, metric.high) for key, metric in run.metrics.items()} == {
        (key, None, None) for key in run.metrics
    }
    (point,) = points([run])
    assert (point["value"], point["low"], point["high"]) == (0.03, None, None)
    assert "(" not in sentence([run], run.bytes).rpartition("it loses")[2]


def test_a_measurement_is_a_run_without_its_file(one: Path) -> None:
    one.unlink()
    for named in (one.parent, schema.path_for(one)):
        found = find([named])
        (run,), problems = found.runs, found.problems
        assert not problems
        assert (run.type, run.metric("kl_mean"), run.path, run.tensors) == ("Q4_K_M", 0.03, None, ())
        assert "is not here" in run.notes[0]


def test_the_measurement_inside_a_file_is_read(shelf: Path, tmp_path: Path) -> None:
    inside = measured(shelf / "tiny-Q8_0.gguf", 0.007, file_sha256="").model_dump_json()
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("dither.measure", inside)
    weights = np.ones((4, 256), np.float32)
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = find([tmp_path])
    (run,), problems = found.runs, found.problems
    assert not problems and run.metric("kl_mean") == 0.007


def test_a_measurement_of_an_earlier_file_is_shown_and_said(one: Path, shelf: Path) -> None:
    late = one.stat().st_mtime_ns + 10**10
    os.utime(one, ns=(late, late))
    assert not find([one]).runs[0].stale  # touched, not changed
    with one.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(one, ns=(late + 1, late + 1))
    stale = find([one]).runs[0]
    assert stale.stale and not stale.comparable
    assert stale.metric("kl_mean") == 0.03 and any("Stale" in note for note in stale.notes)
    shutil.copy2(shelf / "tiny-Q8_0.gguf", one)  # another size: no hash is needed
    assert find([one]).runs[0].stale


def test_a_large_file_that_is_newer_is_doubted_and_not_read(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "HASHED", 100)
    monkeypatch.setattr(runs_module, "content_sha256", lambda model: pytest.fail("read the whole file"))
    late = one.stat().st_mtime_ns + 10**10
    os.utime(one, ns=(late, late))
    run = find([one]).runs[0]
    assert not run.stale and any("may be of an earlier one" in note for note in run.notes)


def test_runs_of_other_texts_are_not_compared(shelf: Path, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_K_M", "Q2_K"):
        shutil.copy2(shelf / f"tiny-{kind}.gguf", tmp_path)
        save(tmp_path / f"tiny-{kind}.gguf", data_sha256="aa" if kind == "Q4_K_M" else "bb")
    found = {run.type: run.comparable for run in find([tmp_path]).runs}
    assert found == {"Q8_0": True, "Q4_K_M": False, "Q2_K": True}


def test_a_terabyte_opens_like_anything_else(tmp_path: Path) -> None:
    """Sparse: whoever read it would never come back."""
    rows = 2**40 // 144 // 64
    layout = lay_out(
        {"general.architecture": string("llama")}, [(f"blk.{i}.ffn_up.weight", (rows, 256), "Q4_K") for i in range(64)]
    )
    place = tmp_path / "huge.gguf"
    with place.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)
    found = find([place])
    (run,), problems = found.runs, found.problems
    assert not problems
    assert run.tensor_bytes == 64 * rows * 144 and len(run.tensors) == 64
    place.unlink()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "no schema_version"),
        ("{", "no JSON"),
        ("NaN", "no schema_version"),
        ('{"schema_version": 99}', "newer Dither"),
        ('{"schema_version": 1, "kl_mean": "<script>"}', "Field required"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_measurement_is_a_problem(one: Path, text: str, reason: str) -> None:
    schema.path_for(one).write_text(text)
    found = find([one])
    assert [run.metrics for run in found.runs] == [{}]  # the file itself is still shown
    assert len(found.problems) == 1 and reason in found.problems[0].reason


def test_numbers_that_are_none_are_refused(one: Path) -> None:
    place = schema.path_for(one)
    place.write_text(place.read_text().replace('"kl_mean":0.03', '"kl_mean":NaN').replace("0.03", "NaN", 1))
    found = find([one])
    assert found.runs[0].metrics == {} and "kl_mean" in found.problems[0].reason


def test_a_gigabyte_of_measurement_is_not_read(one: Path) -> None:
    with schema.path_for(one).open("r+b") as file:
        file.truncate(2**30)
    found = find([one])
    assert found.runs[0].metrics == {} and "too large" in found.problems[0].reason


def test_long_texts_are_cut_and_scripts_are_text(one: Path) -> None:
    save(one, data="x" * 10**6, reference="<script>alert(1)</script>", notes=["\x1b[2J" + "n" * 10**6])
    found = find([one])
    (run,), problems = found.runs, found.problems
    assert not problems
    assert run.measured_on is not None and len(run.measured_on.data) < 500
    assert run.reference == "<script>alert(1)</script>"
    assert all(len(note) < 2000 and "\x1b" not in note for note in run.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": 10**400},
        {"sequences": 10**4000, "context": 10**4000},
        {"kl_mean": 1e308, "kl_mean_high": 1e308},
        {"bpw": 1e-320},
        {"ppl_reference": 1e308, "ppl_ratio": 1e308},
    ],
)
def test_absurd_numbers_are_a_problem_and_no_crash(one: Path, changes: dict[str, object]) -> None:
    save(one, **changes)
    one.rename(one.with_name("other.gguf"))
    found = find([one.parent])
    assert [run.file for run in found.runs] == ["other.gguf"]
    assert [Path(problem.file).name for problem in found.problems] == [f"{one.name}.measure.json"]


def test_numbers_at_the_edge_are_still_drawn(shelf: Path, tmp_path: Path) -> None:
    for kind, kl in (("Q8_0", 1e-308), ("Q4_K_M", 0.0), ("Q2_K", 1e29)):
        shutil.copy2(shelf / f"tiny-{kind}.gguf", tmp_path)
        save(tmp_path / f"tiny-{kind}.gguf", kl)
    dither.report(tmp_path, tmp_path / "r.html", card=tmp_path / "C.md")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_a_name_leads_nowhere_else(one: Path) -> None:
    for name in ("../../../etc", "/etc", "..", "."):
        save(one, reference=name)
        assert find([one]).reference is None


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def test_nothing_is_executed_and_nothing_stops_the_rest(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}')
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (tmp_path / "empty.gguf").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dead.gguf").symlink_to("nowhere")
    (tmp_path / "tiny-Q4_K_M.gguf.answers.json").write_text('{"schema_version": 1, "answers": "x"}')
    found = find([tmp_path, tmp_path / "none", folder / "pytorch_model.bin"])
    assert [run.file for run in found.runs] == ["tiny-Q4_K_M.gguf"]
    assert not (tmp_path / "ran").exists()
    refused = {Path(problem.file).name for problem in found.problems}
    assert refused == {
        "broken.gguf",
        "empty.gguf",
        "pipe.gguf",
        "none",
        "pytorch_model.bin",
        "tiny-Q4_K_M.gguf.answers.json",
        "dead.gguf",
    }
    assert not any("Errno" in problem.reason for problem in found.problems)


@pytest.mark.parametrize("recipe", ["[]", "{", '{"to": 5, "solver": ["x"], "evidence": 1, "source": "s"}', "9" * 5000])
def test_a_strange_recipe_is_none(recipe: str) -> None:
    from dither.reporting.recipes import read_recipe

    found = read_recipe(recipe)
    assert in_words(found) == "" and command(found, "a.gguf") is None


def test_what_a_plan_measured_of_single_tensors_is_shown(shelf: Path, tmp_path: Path) -> None:
    for name in ("tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf.measure.json"):
        shutil.copy2(shelf / name, tmp_path)
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    manifest = {"schema_version": 1, "model": "tiny-llama", "data": {"sha256": "x"}, "files": {}}
    (evidence / "evidence.json").write_text(json.dumps(manifest))
    costs = {
        "version": 1,
        "probe": {"blk.0.attn_q.weight": "Q3_K"},
        "divergence": {"blk.0.attn_q.weight": 0.5},
        "ratios": {"blk.0.attn_q.weight": {"Q4_K": 0.25}},
    }
    (evidence / "sensitivity.abc.json").write_text(json.dumps(costs))
    os.mkfifo(evidence / "sensitivity.pipe.json")  # reading it would wait for ever
    (evidence / "sensitivity.gone.json").symlink_to("nowhere")
    rows = {row.name: row for row in find([tmp_path]).runs[0].tensors}
    assert (rows["blk.0.attn_q.weight"].kl_alone, rows["blk.0.attn_q.weight"].kl_tag) == (0.125, "estimated")
    assert rows["blk.1.attn_q.weight"].kl_alone is None


def test_what_headers_told_is_remembered_within_bounds(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(shelf.glob("*.gguf"))
    opened: list[str] = []
    opening = runs_module.open_headers
    monkeypatch.setattr(
        runs_module, "open_headers", lambda path, *rest: opened.append(path.name) or opening(path, *rest)
    )
    monkeypatch.setattr(runs_module, "_kept", {})
    facts = [runs_module.facts_of(path) for path in paths]
    sizes = [size for _, size in runs_module._kept.values()]
    assert runs_module.facts_of(paths[0]) is facts[0] and len(opened) == len(paths)
    assert all(size > 1000 * len(one.tensors) for one, size in zip(facts, sizes, strict=True))
    monkeypatch.setattr(runs_module, "KEPT_BYTES", 2 * max(sizes))
    runs_module.facts_of(paths[-1])
    assert sum(size for _, size in runs_module._kept.values()) <= 2 * max(sizes) < sum(sizes)
    opened.clear()
    assert runs_module.facts_of(paths[-1]) is facts[-1] and runs_module.facts_of(paths[0]) is facts[0]
    assert opened == []  # the last ones that were asked for
    assert runs_module.facts_of(paths[1]) == facts[1] and opened == [paths[1].name]
