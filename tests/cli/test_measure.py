"""`dither measure` and `dither compare` as a person and a CI job meet them: real files, real exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import dither
from conftest import SENTENCES
from dither.cli.compare import compare
from dither.cli.measure import measure, short

pytestmark = pytest.mark.slow  # starts llama.cpp, which tokenizes

app = typer.Typer(rich_markup_mode=None)
app.command()(measure)
app.command()(compare)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for to in ("Q8_0", "Q4_0"):
        dither.quantize(checkpoint, to, folder / f"{to}.gguf")
    (folder / "tale.txt").write_text("\n".join(f"{n}. {SENTENCES[n % 4]}" for n in range(200)))
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "cli"))


def small(place: Path) -> list[object]:
    return ["--data", place / "tale.txt", "--tokens", 512, "-c", 64]


def test_one_file_is_the_document_that_is_kept(checkpoint: Path, place: Path) -> None:
    made = run("measure", place / "Q4_0.gguf", "--against", checkpoint, *small(place), "--json")
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document == json.loads((place / "Q4_0.gguf.measure.json").read_text())
    assert 0 < document["kl_mean_low"] < document["kl_mean"] < document["kl_mean_high"] < 1
    assert {type(document[name]) for name in ("bytes", "tokens", "sequences", "schema_version")} == {int}


def test_people_read_a_table_of_eighty_columns(checkpoint: Path, place: Path) -> None:
    files = [place / "Q8_0.gguf", place / "Q4_0.gguf"]
    made = run("measure", *files, "--against", checkpoint, *small(place), "--no-save")
    assert made.exit_code == 0, made.output
    table = made.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    heading, eight, four = (line.split() for line in table)
    assert heading[:4] == ["type", "size", "bpw", "KL"]
    assert (eight[0], four[0]) == ("Q8_0", "Q4_0")
    assert float(eight[4]) < float(four[4])
    assert "KL, in nats per token, says how far" in made.stdout
    assert not list(place.glob("*.json"))
    documents = json.loads(run("measure", *files, "--against", checkpoint, *small(place), "--no-save", "--json").stdout)
    assert [short(document["kl_mean"]) for document in documents] == [eight[4], four[4]]


def test_a_gate_for_somebodys_ci(checkpoint: Path, place: Path) -> None:
    """The line a workflow holds: `dither compare ORIGINAL QUANTIZED --max-kld X`."""
    file = place / "Q4_0.gguf"
    broken = run("compare", checkpoint, file, *small(place), "--max-kld", "1e-6", "--json")
    assert broken.exit_code == 3
    document = json.loads(broken.stdout)
    assert document["passed"] is False
    assert document["b"]["kl_mean"] > 1e-6
    kept = run("compare", checkpoint, file, "--max-kld", 1.01 * document["b"]["kl_mean"])
    assert kept.exit_code == 0, kept.output
    assert "is within the limit" in kept.stdout
    above = run("compare", checkpoint, file, "--max-kld", 0.99 * document["b"]["kl_mean"])
    assert above.exit_code == 3
    assert "is above the limit" in above.stdout


def test_two_files_side_by_side(checkpoint: Path, place: Path) -> None:
    a, b = place / "Q8_0.gguf", place / "Q4_0.gguf"
    asked = run("compare", a, b, "--against", checkpoint, *small(place))
    assert asked.exit_code == 0, asked.output
    assert "A is closer to the reference than B" in asked.stdout
    assert "do not overlap" in asked.stdout
    turned = json.loads(run("compare", b, a, "--json").stdout)  # by what the first run kept
    assert (turned["verdict"], turned["overlap"]) == ("lower", False)
    assert turned["difference_high"] < 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["measure", "{place}/Q8_0.gguf"], 2, "--against"),
        (["measure", "{place}/none.gguf", "--against", "{checkpoint}"], 1, "no such file"),
        (["measure", "{place}/tale.txt", "--against", "{checkpoint}"], 1, "neither GGUF nor"),
        (["compare", "{place}/tale.json", "{place}/Q8_0.gguf"], 1, "cannot be read"),
        (["compare", "{place}/Q8_0.gguf", "{place}/Q4_0.gguf", "--max-kld", "-1"], 2, "--max-kld"),
        (["compare", "{place}/Q8_0.gguf", "{place}/Q4_0.gguf", "--max-kld", "inf"], 2, "a limit of inf"),
    ],
)
def test_errors_name_the_thing(checkpoint: Path, place: Path, arguments: list[str], code: int, said: str) -> None:
    failed = run(*(text.format(place=place, checkpoint=checkpoint) for text in arguments))
    assert failed.exit_code == code, failed.output
    assert said in " ".join(failed.stderr.split())
    assert failed.stdout == ""
