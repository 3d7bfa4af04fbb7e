"""`dither plan`, `dither ladder` and `dither quantize` with a budget, as a person and a script meet them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import dither
from conftest import BUNDLED, FEW_TYPES
from dither.cli import app
from dither.containers.plan_file import read_plan

pytestmark = pytest.mark.slow  # models run

SIZE = 2_600_000


def run(*arguments: object, columns: int = 80) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


@pytest.fixture
def known(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The options under which nothing is left to measure."""
    monkeypatch.chdir(tmp_path)
    return ["--evidence", learnt, "--solver", "nearest", "--types", ",".join(FEW_TYPES)]


def test_a_plan_is_printed_kept_and_followed(known: list[object], learnt: Path, tmp_path: Path) -> None:
    made = run("plan", BUNDLED, "--size", SIZE, *known)
    assert made.exit_code == 0, made.output
    *lines, last = made.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    types = {tensor.type for tensor in read_plan("plan.toml").tensors.values()}
    assert types == {line.split()[0] for line in lines if line.startswith("Q")}
    # The command to go on with is one that works.
    words = shlex.split(last.removeprefix("Make it:"))
    assert words[0] == "dither"
    followed = run(*words[1:], "-o", "m.gguf", "--measure", "--json")
    assert followed.exit_code == 0, followed.output
    assert json.loads(followed.stdout)["bytes"] == (tmp_path / "m.gguf").stat().st_size <= SIZE
    shown = run("inspect", "m.gguf")
    assert any(line.startswith("size") and line.rstrip().endswith("plan") for line in shown.stdout.splitlines())


def test_the_document_of_a_plan(known: list[object], tmp_path: Path) -> None:
    made = run("plan", BUNDLED, "--bpw", 4.25, "-o", "p.toml", "--json", *known)
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    plan = read_plan(tmp_path / "p.toml")
    assert document["tensors"]["token_embd.weight"]["type"] == plan.tensors["token_embd.weight"].type
    assert (document["path"], document["predicted_kl"]) == ("p.toml", plan.kl)
    assert document["bits_per_weight"] <= 4.25


def test_memory_is_what_the_model_may_take_running(known: list[object]) -> None:
    from dither.capacity.memory import weights_budget
    from dither.capacity.shape import shape_of

    room = {}
    for context in (256, 512):
        made = run("plan", BUNDLED, "--memory", "40MiB", "-c", context, "--force", "--json", *known)
        assert made.exit_code == 0, made.output
        shape, _ = shape_of(dither.open_model(BUNDLED))
        weights = weights_budget(40 * 2**20, shape, context)
        room[context] = json.loads(made.stdout)["tensor_bytes"]
        assert room[context] <= weights
    assert room[512] <= room[256]


def test_within_a_budget_people_read_what_won(known: list[object], tmp_path: Path) -> None:
    made = run("quantize", BUNDLED, "--size", SIZE, "-o", "m.gguf", *known)
    assert made.exit_code == 0, made.output
    assert "Kept: plan." in made.stdout.replace("\n", " ")
    assert "Predicted 0.0" in made.stdout
    assert max(map(len, made.stdout.splitlines())) <= 80
    assert (tmp_path / "m.gguf").stat().st_size <= SIZE


def test_the_document_of_a_budget(known: list[object], tmp_path: Path) -> None:
    made = run("quantize", BUNDLED, "--max-kld", 0.02, "-o", "m.gguf", "--no-validate", "--json", *known)
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document["measurement"]["kl_mean"] <= 0.02 or document["notes"]
    assert (document["winner"], document["validation"]) == ("plan", [])
    assert document["bytes"] == (tmp_path / "m.gguf").stat().st_size == document["plan"]["file_bytes"]


def test_a_ladder_is_a_table_or_a_document(known: list[object], tmp_path: Path) -> None:
    made = run("ladder", BUNDLED, "--sizes", "2.2MB,2.6MB", *known)
    assert made.exit_code == 0, made.output
    assert max(map(len, made.stdout.splitlines())) <= 80
    assert len(made.stdout.splitlines()) == 3
    again = run("ladder", BUNDLED, "--to", "q2_k", "-o", "files", "--json", *known)
    assert again.exit_code == 0, again.output
    [rung] = json.loads(again.stdout)
    assert rung["bytes"] == (tmp_path / rung["path"]).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "{m}"], 2, "exactly one of --size"),
        (["plan", "{m}", "--size", "3MB", "--bpw", "4"], 2, "exactly one of --size"),
        (["plan", "{m}", "--bpw", "nan"], 2, "no positive number"),
        (["plan", "{m}", "--bpw", "1e300"], 2, "more than a weight can have"),
        (["plan", "{m}", "--max-kld", "-1"], 2, "no positive number"),
        (["plan", "{m}", "--size", "much"], 2, "is not a size"),
        (["plan", "{m}", "--size", "0"], 2, "is too little"),
        (["plan", "{m}", "--size", "1MB", "--evidence", "{e}"], 2, "too small"),
        (["plan", "{m}", "--memory", "1MB", "--evidence", "{e}"], 2, "too small"),
        (["plan", "{m}", "--bpw", "4", "--evidence", "{e}", "--types", "Q9_Z"], 2, "Q9_Z"),
        (["plan", "{m}", "--bpw", "4", "--evidence", "{e}/imatrix.gguf"], 2, "importance matrix"),
        (["plan", "{m}", "--bpw", "4", "--evidence", "nowhere"], 1, "nowhere"),
        (["plan", "{m}", "--bpw", "4", "-o", "none/p.toml"], 1, "is no folder"),
        (["quantize", "{m}", "--to", "Q4_K_M", "--size", "3MB"], 2, "one of --to, --plan"),
        (["quantize", "{m}", "--to", "Q4_K_M", "--plan", "p.toml"], 2, "one of --to, --plan"),
        (["quantize", "{m}", "--size", "3MB", "--bpw", "4"], 2, "one of --to, --plan"),
        (["quantize", "{m}", "--size", "3MB", "--pure"], 2, "dither plan"),
        (["quantize", "{m}", "--size", "3MB", "--tensor", "a=Q8_0"], 2, "dither plan"),
        (["quantize", "{m}", "--size", "3MB", "--dry-run"], 2, "dither plan"),
        (["quantize", "{m}", "--plan", "p.toml"], 2, "p.toml"),
        (["quantize", "{m}", "--plan", "p.toml", "--dry-run"], 2, "--dry-run"),
        (["quantize", "{m}", "--to", "Q4_K_M", "--types", "Q4_K"], 2, "--types: goes with a budget"),
        (["quantize", "{m}", "--to", "Q4_K_M", "--no-validate"], 2, "goes with a budget"),
        (["ladder", "{m}"], 2, "no rungs"),
        (["ladder", "{m}", "--sizes", ","], 2, "no rungs"),
        (["ladder", "{m}", "--to", "Q4_K_M"], 2, "needs --evidence"),
        (["ladder", "{m}", "--sizes", "3MB,3MB", "--evidence", "{e}"], 2, "two rungs"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_any_work(
    own_evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in own_evidence.iterdir())
    words = [word.format(m=BUNDLED, e=own_evidence) for word in arguments]
    failed = run(*words, columns=300)
    assert failed.exit_code == code, failed.output
    assert said in failed.stderr
    assert failed.stdout == ""
    document = json.loads(run(*words, "--json").stdout)
    assert set(document["error"]) == {"thing", "reason", "way_out"}
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in own_evidence.iterdir()) == before


@pytest.mark.parametrize("command", ["plan", "ladder", "quantize"])
def test_help_fits_eighty_columns(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout.replace("A,B,…", "").replace("Q8_0, …", "")  # nothing is cut off


def test_a_plan_that_exists_is_kept(known: list[object], tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("mine")
    failed = run("plan", BUNDLED, "--size", SIZE, *known)
    assert failed.exit_code == 1
    assert "exists already" in failed.stderr
    assert (tmp_path / "plan.toml").read_text() == "mine"
    assert run("plan", BUNDLED, "--size", SIZE, "--force", *known).exit_code == 0
    assert read_plan(tmp_path / "plan.toml").model == "demo_model"
