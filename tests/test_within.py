"""`quantize_within` and `ladder`: the best of three files, measured, within the budget, nothing left over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import dither
from conftest import BUNDLED, FEW_TYPES
from dither.containers.plan_file import PlanEntry, plan_sha256, read_plan
from dither.errors import OutputError, UsageError
from dither.planning import budget as budgets, plan as planning, rivals
from dither.planning.knapsack import Allocation, Item, allocate

pytestmark = pytest.mark.slow  # models run

Prices = dict[str, dict[str, PlanEntry]]
ORIGINAL = dither.open_model(BUNDLED)
SIZE = 2_600_000


@pytest.fixture
def known(learnt: Path) -> dict[str, Any]:
    return {"evidence": learnt, "solver": "nearest", "types": FEW_TYPES}


def wanted(**budget: Any) -> dither.Budget:
    return dither.budget(**budget, parameters=ORIGINAL.parameters)


def worst(items: Sequence[Item], budget: int) -> Allocation:
    """Sensitivities upside down: the embedding last of all, what matters least first."""
    most = max(choice.kl for item in items for choice in item.choices)
    turned = [
        Item(i.tensors, tuple(replace(c, kl=most - max(x.kl for x in i.choices) + c.kl) for c in i.choices))
        for i in items
    ]
    turned = [
        Item(i.tensors, tuple(replace(c, kl=most * c.bytes) if "token_embd" in i.tensors[0] else c for c in i.choices))
        for i in turned
    ]
    return allocate(turned, budget)


def repriced(prices: Prices, change: Callable[[float], float]) -> Prices:
    return {
        name: {kind: replace(price, kl=change(price.kl or 0.0)) for kind, price in kinds.items()}
        for name, kinds in prices.items()
    }


class Listening:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, total: int, done: int) -> None: ...
    def advance(self, amount: int, what: str) -> None: ...


def embedded(path: str | Path) -> dict[str, Any]:
    return dict(json.loads(gguf.GGUFReader(path).fields["dither.measure"].contents()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_plan_wins_and_is_measured(known: dict[str, Any], tmp_path: Path) -> None:
    heard = Listening()
    found = dither.quantize_within(ORIGINAL, wanted(size=SIZE), tmp_path / "m.gguf", progress=heard, **known)
    assert found.winner == "plan"
    assert [rival.name.partition(" ")[0] for rival in found.rivals] == ["plan", "preset", "random"]
    assert found.rivals[0].kl < min(rival.kl for rival in found.rivals[1:])
    assert max(rival.bytes for rival in found.rivals) <= SIZE
    assert found.rivals[0].bytes == found.result.bytes
    assert found.result.bytes == (tmp_path / "m.gguf").stat().st_size == found.planned.file_bytes <= SIZE
    assert names(tmp_path) == ["m.gguf", "m.gguf.measure.json", "m.toml"]
    measurement = found.result.measurement
    assert measurement is not None and embedded(tmp_path / "m.gguf")["kl_mean"] == measurement.kl_mean
    # The rivals are told apart by the second half of the held-back text, the sequences' own numbers.
    kl, tokens = np.array(measurement.sequence_kl), np.array(measurement.sequence_tokens)
    half = max(1, len(kl) // 2)
    assert found.rivals[0].kl == pytest.approx(np.average(kl[half:], weights=tokens[half:]))
    # What is there to say is said once, not once for each rival.
    assert len(heard.notes) == len(set(heard.notes))
    again = dither.quantize(ORIGINAL, plan=tmp_path / "m.toml", out=tmp_path / "again.gguf", evidence=known["evidence"])
    assert [t.type for t in again.plan.tensors] == [t.type for t in found.result.plan.tensors]
    document = json.loads(json.dumps(found.to_json()))
    assert document["winner"] == "plan" and len(document["validation"]) == 3


def test_a_plan_that_loses_gives_way_to_the_preset(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "allocate", worst)
    found = dither.quantize_within(ORIGINAL, wanted(size=SIZE), tmp_path / "m.gguf", **known)
    kl = {rival.name: rival.kl for rival in found.rivals}
    assert found.winner.startswith("preset Q") and kl[found.winner] == min(kl.values()) < kl["plan"]
    assert any(found.winner in note and "instead" in note for note in found.notes)
    path = tmp_path / "m.gguf"
    assert found.result.path == str(path)
    assert path.stat().st_size == found.result.bytes <= SIZE
    assert dither.inspect(path).file_type == found.winner.removeprefix("preset ")
    kept = json.loads((tmp_path / "m.gguf.measure.json").read_text())
    assert kept["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert kept["file"] == "m.gguf"
    assert found.result.measurement is not None
    assert kept["kl_mean"] == embedded(path)["kl_mean"] == found.result.measurement.kl_mean
    assert names(tmp_path) == ["m.gguf", "m.gguf.measure.json"]  # no plan made what stands there
    assert found.planned.path is None


def test_a_preset_that_a_folders_format_is_called_like_is_still_a_gguf(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "allocate", worst)
    monkeypatch.setattr(rivals, "nearest_preset", lambda *_: "MXFP4")
    found = dither.quantize_within(ORIGINAL, wanted(size=SIZE + 400_000), tmp_path / "m.gguf", **known)
    assert [rival.name for rival in found.rivals][1] == "preset MXFP4"
    assert (tmp_path / "m.gguf").is_file() and found.rivals[1].kl < found.rivals[0].kl


def test_the_plan_beside_a_file_is_the_one_that_made_it(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random allocation draws what would have been planned, and the plan is the worst there is."""

    def best(planned: dither.Planned) -> Any:
        drawn = allocate(planned.items, planned.allowed)
        tensors = {
            i.tensors[0]: planned.prices[i.tensors[0]][c.type] for i, c in zip(planned.items, drawn.chosen, strict=True)
        }
        return replace(planned.plan, tensors={**planned.plan.tensors, **tensors}, kl=drawn.kl)

    monkeypatch.setattr(planning, "allocate", worst)
    monkeypatch.setattr(rivals, "random_plan", best)
    found = dither.quantize_within(ORIGINAL, wanted(size=SIZE), tmp_path / "m.gguf", **known)
    assert found.winner == "random allocation" and found.planned.path == str(tmp_path / "m.toml")
    recipe = json.loads(gguf.GGUFReader(tmp_path / "m.gguf").fields["dither.recipe"].contents())
    assert recipe["plan"] == plan_sha256(read_plan(tmp_path / "m.toml"))


def test_without_validation_there_are_no_rivals(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "allocate", worst)
    found = dither.quantize_within(ORIGINAL, wanted(bpw=4), tmp_path / "m.gguf", validate=False, **known)
    assert (found.rivals, found.winner) == ((), "plan")
    assert found.result.measurement is not None
    assert found.result.bits_per_weight <= 4
    assert dither.inspect(tmp_path / "m.gguf").file_type == "plan"


def test_a_divergence_is_met_as_measured(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction is made too hopeful by half: a larger file follows."""
    hopeful = planning._prices

    def half(*arguments: Any) -> Prices:
        return repriced(hopeful(*arguments), lambda kl: 0.5 * kl)

    monkeypatch.setattr(planning, "_prices", half)
    found = dither.quantize_within(ORIGINAL, wanted(max_kld=0.01), tmp_path / "m.gguf", validate=False, **known)
    assert found.planned.plan.kl is not None and found.result.measurement is not None
    assert found.planned.plan.kl < 0.8 * 0.01  # it was planned again
    assert found.result.measurement.kl_mean <= 0.01 or any("0.01" in note for note in found.notes)
    assert embedded(tmp_path / "m.gguf")["kl_mean"] == found.result.measurement.kl_mean
    assert names(tmp_path) == ["m.gguf", "m.gguf.measure.json", "m.toml"]


def test_a_divergence_that_cannot_be_met_is_said_and_the_file_kept(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = planning._prices

    def blind(*arguments: Any) -> Prices:
        return repriced(plain(*arguments), lambda _: 1e-6)

    monkeypatch.setattr(planning, "_prices", blind)
    found = dither.quantize_within(ORIGINAL, wanted(max_kld=1e-4), tmp_path / "m.gguf", validate=False, **known)
    assert found.result.measurement is not None and found.result.measurement.kl_mean > 1e-4
    assert any("above 0.0001" in note for note in found.notes)
    assert (tmp_path / "m.gguf").stat().st_size == found.result.bytes


@pytest.mark.parametrize("transform", ["rotate", "awq"])
def test_what_a_transform_adds_is_within_the_budget(known: dict[str, Any], tmp_path: Path, transform: str) -> None:
    """A rotated model has an output matrix of its own, a quarter more, and awq a record in the header."""
    found = dither.quantize_within(
        ORIGINAL, wanted(size=3_400_000), tmp_path / "m.gguf", transforms=[transform], validate=False, **known
    )
    tensors = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in tensors) == (transform == "rotate")
    assert 0.995 * 3_400_000 < (tmp_path / "m.gguf").stat().st_size <= 3_400_000
    assert found.result.transforms is not None and transform in found.result.transforms


@pytest.mark.parametrize("existing", ["m.gguf", "m.toml"])
def test_what_exists_is_kept(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: str
) -> None:
    (tmp_path / existing).write_text("mine")
    monkeypatch.setattr(budgets, "plan_for", lambda *_, **__: pytest.fail("there was work before"))
    with pytest.raises(OutputError, match="exists already"):
        dither.quantize_within(ORIGINAL, wanted(size=SIZE), tmp_path / "m.gguf", **known)
    assert (tmp_path / existing).read_text() == "mine"
    assert names(tmp_path) == [existing]


class TestLadder:
    def test_rungs_are_files_by_size_each_with_what_it_costs(self, known: dict[str, Any], tmp_path: Path) -> None:
        rungs = dither.ladder(
            ORIGINAL, [wanted(size=4_000_000), "q3_k_m", wanted(size=2_200_000)], tmp_path / "new", **known
        )
        assert [rung.wanted for rung in rungs] == ["a file of 2.10 MiB", "Q3_K_M", "a file of 3.81 MiB"]
        sizes = [Path(rung.path).stat().st_size for rung in rungs]
        assert sizes == [rung.bytes for rung in rungs] == sorted(sizes)
        assert sizes[0] <= 2_200_000 and sizes[2] <= 4_000_000
        assert rungs[0].kl > rungs[1].kl > rungs[2].kl
        for rung in rungs:
            assert embedded(rung.path)["kl_mean"] == rung.kl
            assert rung.kl_low <= rung.kl <= rung.kl_high
        assert [dither.inspect(rung.path).file_type for rung in rungs] == ["plan", "Q3_K_M", "plan"]

    @pytest.mark.parametrize(
        ("rungs", "error", "message"),
        [
            ([{"size": 4_000_000}, "Q8_0"], OutputError, "exists already"),
            ([{"size": 4_000_000}, "Q4_KM"], UsageError, "Q4_K_M"),
            ([{"size": 4_000_000}, {"size": 4_000_001}], UsageError, "two rungs called 3.81MiB"),
            (["Q4_K_M", "q4_k_m"], UsageError, "two rungs"),
        ],
    )
    def test_what_cannot_be_made_is_refused_before_any_work(
        self, known: dict[str, Any], tmp_path: Path, rungs: list[Any], error: type, message: str
    ) -> None:
        (tmp_path / "demo_model-Q8_0.gguf").write_text("mine")
        asked = [wanted(**rung) if isinstance(rung, dict) else rung for rung in rungs]
        with pytest.raises(error, match=message):
            dither.ladder(ORIGINAL, asked, tmp_path, **known)
        assert names(tmp_path) == ["demo_model-Q8_0.gguf"]

    def test_presets_need_text_to_be_measured_on(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="needs --evidence"):
            dither.ladder(ORIGINAL, [wanted(size=4_000_000), "Q4_K_M"], tmp_path / "new")
        assert names(tmp_path) == []

    def test_a_folder_that_is_a_file_is_named(self, known: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="file: cannot be made a folder"):
            dither.ladder(ORIGINAL, ["Q4_K_M"], tmp_path / "file", **known)


def test_an_interrupted_judgment_continues(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's file has its name by then: the same command takes it for its own, and for nobody else's."""

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    path = tmp_path / "q.gguf"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(budgets, "hold_against", interrupted)
        dither.quantize_within(ORIGINAL, wanted(size=SIZE), path, **known)
    first = path.read_bytes()
    monkeypatch.setattr(budgets, "hold_against", lambda *given: (given[4], (), "plan"))
    found = dither.quantize_within(ORIGINAL, wanted(size=SIZE), path, **known)
    assert path.read_bytes() == first and found.winner == "plan"
    assert sorted(names(tmp_path)) == ["q.gguf", "q.gguf.measure.json", "q.toml"]
    with pytest.raises(OutputError, match="exists already"):
        dither.quantize_within(ORIGINAL, wanted(size=SIZE), path, **known)
    (tmp_path / "q.gguf.judging").write_text("1 1")  # of another file
    with pytest.raises(OutputError, match="exists already"):
        dither.quantize_within(ORIGINAL, wanted(size=SIZE), path, **known)
