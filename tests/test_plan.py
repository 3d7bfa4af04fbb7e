"""`plan`, and `quantize` by a plan: budgets kept to the byte, costs measured once, files replayed.

The bundled model on few tokens; sizes are taken from the disk, types through the `gguf` package's reader.
"""

from __future__ import annotations

import hashlib
import inspect as python_inspect
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import dither
from conftest import BUNDLED, FEW_TYPES
from dither.containers.gguf_target import ANY_GGUF
from dither.containers.plan_file import plan_sha256, read_plan
from dither.errors import OutputError, SourceError, UsageError
from dither.measuring import sensitivity
from dither.planning import plan as planning, sensitivity as sensitivities
from dither.quantizing.request import Running
from dither.quantizing.tensor_pass import no_evidence
from dither.solvers.nearest import Nearest
from dither.types import Model

pytestmark = pytest.mark.slow  # models run

SIZES = [1_900_000, 2_500_000, 3_400_000, 5_000_000]
ORIGINAL = dither.open_model(BUNDLED)


def test_a_tensor_that_the_probe_gives_back_is_probed_more_coarsely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error tells nothing of other types: they were predicted to cost nothing either."""
    dither.quantize(BUNDLED, "Q8_0", tmp_path / "eight.gguf", pure=True)
    eight = dither.open_model(tmp_path / "eight.gguf")
    matrices = [tensor.name for tensor in eight.tensors if len(tensor.shape) > 1]
    monkeypatch.setattr(sensitivities, "PROBE", "Q8_0")

    def coarser(model: Model) -> dict[str, str]:
        nothing: Any = None  # no evidence was learnt
        ready = sensitivities.Ready(model, nothing, Nearest(), model, no_evidence, frozenset())
        return dict(sensitivities._coarser(ready))

    found = coarser(eight)
    assert len(found) == len(matrices) and set(found.values()) == {"Q4_0"}
    assert all(any(re.search(pattern, name) for pattern in found) for name in matrices)
    assert coarser(ORIGINAL) == {}


@pytest.fixture
def known(learnt: Path) -> dict[str, Any]:
    """The arguments under which nothing is left to measure."""
    return {"evidence": learnt, "solver": "nearest", "types": FEW_TYPES}


def planned(size: int, known: dict[str, Any], **others: Any) -> dither.Planned:
    return dither.plan(ORIGINAL, size=size, **known | others)


def nothing_finer(found: dither.Planned, spare: int) -> bool:
    """Whether no tensor could become better in `spare` more bytes."""
    for item in found.items:
        [now] = [c for c in item.choices if c.type == found.plan.tensors[item.tensors[0]].type]
        if any(c.bytes <= now.bytes + spare and c.kl < now.kl * (1 - 1e-9) for c in item.choices):
            return False
    return True


def types_on_disk(path: str | Path) -> dict[str, str]:
    return {tensor.name: gguf.GGMLQuantizationType(tensor.tensor_type).name for tensor in gguf.GGUFReader(path).tensors}


class TestBudget:
    @pytest.mark.parametrize("size", SIZES)
    def test_the_file_has_the_bytes_that_were_planned(self, known: dict[str, Any], tmp_path: Path, size: int) -> None:
        found = planned(size, known)
        assert found.file_bytes <= size
        assert found.file_bytes >= 0.995 * size or nothing_finer(found, size - found.file_bytes)
        dither.quantize(ORIGINAL, plan=found.plan, out=tmp_path / "m.gguf", evidence=known["evidence"], measure=True)
        assert (tmp_path / "m.gguf").stat().st_size == found.file_bytes
        on_disk = types_on_disk(tmp_path / "m.gguf")
        assert {name: on_disk[name] for name in found.plan.tensors} == {
            name: tensor.type for name, tensor in found.plan.tensors.items()
        }
        # What no plan decides about is as exact as ever.
        assert {kind for name, kind in on_disk.items() if name not in found.plan.tensors} == {"F32"}
        assert all(name.endswith("norm.weight") for name in on_disk.keys() - found.plan.tensors.keys())
        assert found.plan.tensor_bytes == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)

    def test_without_a_measurement_the_file_is_smaller_by_the_room_for_it(
        self, known: dict[str, Any], tmp_path: Path
    ) -> None:
        found = planned(2_500_000, known)
        result = dither.quantize(ORIGINAL, plan=found.plan, out=tmp_path / "m.gguf", evidence=known["evidence"])
        assert found.file_bytes - 10_000 < result.bytes < found.file_bytes

    @pytest.mark.parametrize("bpw", [3.0, 4.25, 6.5])
    def test_bits_per_weight_are_those_of_all_tensors(self, known: dict[str, Any], bpw: float) -> None:
        found = dither.plan(ORIGINAL, bpw=bpw, **known)
        assert found.bits_per_weight <= bpw
        spare = int((bpw - found.bits_per_weight) * found.parameters / 8)
        assert found.bits_per_weight >= 0.995 * bpw or nothing_finer(found, spare)
        sizes = {"Q2_K": 84, "Q4_K": 144, "Q6_K": 210, "Q8_0": 34 * 8}  # bytes of 256 weights
        total = 0.0
        for tensor in ORIGINAL.tensors:
            kind = found.plan.tensors.get(tensor.name)
            total += tensor.size * (4 if kind is None else sizes[kind.type] / 256)
        assert found.bits_per_weight == pytest.approx(8 * total / sum(t.size for t in ORIGINAL.tensors))

    def test_a_divergence_is_kept_as_predicted_by_no_larger_a_file_than_needed(self, known: dict[str, Any]) -> None:
        sizes = []
        for most in (0.05, 0.01, 0.003):
            found = dither.plan(ORIGINAL, max_kld=most, **known)
            assert found.plan.kl is not None and 0.5 * most < found.plan.kl <= most
            assert found.plan.kl == pytest.approx(math.fsum(t.kl or 0 for t in found.plan.tensors.values()))
            # A file one block smaller cannot be as good.
            less = planned(found.file_bytes - 32, known)
            assert less.plan.kl is not None and less.plan.kl > most
            sizes.append(found.file_bytes)
        assert sizes == sorted(sizes)

    def test_more_bytes_never_cost_more(self, known: dict[str, Any]) -> None:
        predicted = [planned(size, known).plan.kl or 0.0 for size in SIZES]
        assert predicted == sorted(predicted, reverse=True)

    def test_only_types_that_are_asked_for_are_chosen(self, known: dict[str, Any]) -> None:
        found = planned(2_500_000, known, types=["q4_k", "Q2_K"])
        assert {tensor.type for tensor in found.plan.tensors.values()} <= {"Q4_K", "Q2_K"}

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"size": "3MB", "bpw": 4.0},
            {"bpw": 4.0, "max_kld": 0.1},
            {"bpw": math.nan},
            {"bpw": 0.0},
            {"bpw": -1.0},
            {"bpw": math.inf},
            {"bpw": 1e300},
            {"max_kld": math.nan},
            {"max_kld": 0.0},
            {"max_kld": -0.1},
            {"size": 0},
            {"size": -5},
            {"size": "0"},
            {"size": "nan"},
            {"size": "-3MB"},
            {"size": "many"},
        ],
    )
    def test_a_budget_that_is_none_is_refused(self, known: dict[str, Any], wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            dither.plan(ORIGINAL, **wrong, **known)


class TestTooSmall:
    def test_the_smallest_size_is_named_and_can_be_had(self, known: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"too small.*--size (\d+)") as caught:
            planned(1_000_000, known)
        least = int(str(caught.value).partition("--size ")[2].split(",")[0])
        found = planned(least, known)
        assert found.file_bytes == least
        assert {tensor.type for tensor in found.plan.tensors.values()} == {"Q2_K"}
        with pytest.raises(UsageError, match="too small"):
            planned(least - 1, known)

    def test_the_fewest_bits_are_named_and_can_be_had(self, known: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=r"too small.*--bpw ([\d.]+)") as caught:
            dither.plan(ORIGINAL, bpw=0.1, **known)
        bits = float(str(caught.value).partition("--bpw ")[2].split(",")[0])
        assert dither.plan(ORIGINAL, bpw=bits, **known).bits_per_weight <= bits
        with pytest.raises(UsageError, match="too small"):
            dither.plan(ORIGINAL, bpw=bits - 0.002, **known)

    def test_it_is_known_before_anything_is_measured(self, own_evidence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forget(own_evidence)
        monkeypatch.setattr(planning, "known_costs", lambda *_: pytest.fail("it was measured first"))
        with pytest.raises(UsageError, match="too small"):
            dither.plan(ORIGINAL, size=1000, evidence=own_evidence, solver="nearest", types=FEW_TYPES)

    def test_a_divergence_out_of_reach_names_the_best(self, known: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="out of reach"):
            dither.plan(ORIGINAL, max_kld=1e-9, **known)


class TestEvidence:
    def test_an_importance_matrix_is_refused(self, learnt: Path) -> None:
        with pytest.raises(UsageError, match="importance matrix"):
            dither.plan(ORIGINAL, bpw=4, evidence=learnt / "imatrix.gguf")

    def test_another_models_evidence_is_refused(self, learnt: Path, checkpoint: Path) -> None:
        with pytest.raises(dither.DitherError, match=r"learnt from|names none|is evidence on"):
            dither.plan(checkpoint, bpw=4, evidence=learnt)

    def test_a_folder_that_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError):
            dither.plan(ORIGINAL, bpw=4, evidence=tmp_path / "nothing")

    def test_without_any_it_is_learnt_beside_the_plan_and_found_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[dict[str, Any]] = []

        def few(*arguments: Any, **options: Any) -> object:
            calls.append(options)
            return dither.calibrate(*arguments, **options | {"tokens": 1024, "context": 128})

        monkeypatch.setattr(planning, "calibrate", few)
        common: dict[str, Any] = {"solver": "nearest", "types": ["Q2_K", "Q6_K"], "out": tmp_path / "p.toml"}
        first = dither.plan(BUNDLED, bpw=4, **common)
        folder = tmp_path / "demo_model-evidence"
        assert (folder / "evidence.json").is_file()
        assert first.evidence == str(folder)
        assert [call["gradients"] for call in calls] == [True]
        again = dither.plan(BUNDLED, bpw=4, force=True, **common)
        assert len(calls) == 1
        assert again.plan == first.plan


class TestPlaces:
    def test_an_existing_plan_is_kept(
        self, known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "p.toml").write_text("mine")
        monkeypatch.setattr(planning, "known_costs", lambda *_: pytest.fail("it was measured first"))
        for place in (tmp_path / "p.toml", tmp_path / "none" / "p.toml"):
            with pytest.raises(OutputError):
                planned(2_500_000, known, out=place)
        assert (tmp_path / "p.toml").read_text() == "mine"

    def test_what_is_written_is_what_is_returned(self, known: dict[str, Any], tmp_path: Path) -> None:
        found = planned(2_500_000, known, out=tmp_path / "p.toml")
        assert read_plan(tmp_path / "p.toml") == found.plan
        assert found.path == str(tmp_path / "p.toml")
        assert json.loads(json.dumps(found.to_json()))["file_bytes"] == found.file_bytes


def cost_files(evidence: Path) -> list[Path]:
    return sorted(evidence.glob("sensitivity.*"))


def forget(evidence: Path) -> None:
    for path in cost_files(evidence):
        path.unlink()


class TestCosts:
    """What was measured is not measured again, whatever happened in between."""

    def test_nothing_is_measured_twice(self, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sensitivities, "_measure", lambda *_: pytest.fail("it was measured again"))
        monkeypatch.setattr(sensitivities, "error_ratios", lambda *_: pytest.fail("it was solved again"))
        planned(2_500_000, known)

    def test_only_what_is_missing_is_measured(
        self, own_evidence: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [path] = cost_files(own_evidence)
        whole = json.loads(path.read_text())
        lost = ["token_embd.weight", "blk.2.ffn_up.weight"]
        marked = json.loads(path.read_text())
        for name in lost:
            del marked["divergence"][name]
        del marked["ratios"]["blk.0.attn_q.weight"]["Q4_K"]
        marked["divergence"]["blk.1.attn_k.weight"] = 0.125  # would be lost, were it measured again
        path.write_text(json.dumps(marked))
        heard: list[str] = []
        measure = sensitivity.divergences

        def listening(network: Any, probe: Any, names: Any, *others: Any) -> None:
            heard.extend(names)
            measure(network, probe, names, *others)

        monkeypatch.setattr(sensitivity, "divergences", listening)
        planned(2_500_000, known, evidence=own_evidence)
        found = json.loads(path.read_text())
        assert sorted(heard) == sorted(lost)
        assert found["divergence"].pop("blk.1.attn_k.weight") == 0.125
        del whole["divergence"]["blk.1.attn_k.weight"]
        assert found["divergence"] == pytest.approx(whole["divergence"], rel=1e-6)
        for name, ratios in whole["ratios"].items():  # float32 products round by where memory begins
            assert found["ratios"][name] == pytest.approx(ratios, rel=1e-6)
        assert cost_files(own_evidence) == [path]  # the probe is gone

    def test_as_much_text_is_read_for_the_rest_as_for_all(
        self, own_evidence: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [path] = cost_files(own_evidence)
        spoilt = json.loads(path.read_text())
        del spoilt["divergence"]["token_embd.weight"]
        path.write_text(json.dumps(spoilt))
        asked: list[int] = []
        affordable = sensitivity.affordable

        def listening(text: Any, tensors: int) -> Any:
            asked.append(tensors)
            return affordable(text, tensors)

        monkeypatch.setattr(sensitivity, "affordable", listening)
        planned(2_500_000, known, evidence=own_evidence)
        assert asked == [29]

    def test_costs_that_contradict_themselves_are_measured_anew(
        self, own_evidence: Path, known: dict[str, Any]
    ) -> None:
        [path] = cost_files(own_evidence)
        whole = planned(2_500_000, known, evidence=own_evidence)
        spoilt = json.loads(path.read_text())
        for name in ("token_embd.weight", "blk.3.ffn_up.weight"):  # measured, but at which type?
            del spoilt["probe"][name]
        path.write_text(json.dumps(spoilt))
        again = planned(2_500_000, known, evidence=own_evidence).plan
        assert plan_sha256(again) == plan_sha256(whole.plan)
        assert again.kl == pytest.approx(whole.plan.kl, rel=1e-6)

    def test_costs_that_are_lost_are_said_to_be_measured_again(self, own_evidence: Path, known: dict[str, Any]) -> None:
        [path] = cost_files(own_evidence)
        path.write_bytes(path.read_bytes()[:-7])
        heard: list[str] = []

        class Listening(dither.progress.Silent):
            def note(self, text: str) -> None:
                heard.append(text)

        planned(2_500_000, known, evidence=own_evidence, progress=Listening())
        assert str(path) in heard[0] and "lost" in heard[0] and "measured again" in heard[0]
        assert heard[1].startswith("Measuring what the rounding")

    def test_another_solver_or_evidence_has_another_file(
        self, own_evidence: Path, learnt: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def name(solver: str, transforms: Sequence[str] = (), **manifest: Any) -> str:
            store = dither.EvidenceStore.open(own_evidence)
            store.sha256 = manifest.get("sha256", store.sha256)
            chosen = planning.choose_solver(solver, store, 1)
            opened: list[Path] = []
            with monkeypatch.context() as patch:
                patch.setattr(sensitivities, "_measure", lambda *_: None)
                patch.setattr(
                    sensitivities, "_all_ratios", lambda ready, allowed, target, costs, *_: opened.append(costs.path)
                )
                ready = sensitivities.made_ready(ORIGINAL, store, chosen, transforms, 1)
                sensitivities.known_costs(ready, {}, ANY_GGUF, Running(threads=1))
            return opened[0].name

        assert name("nearest") == cost_files(learnt)[0].name
        others = name("gptq"), name("nearest", ["rotate"]), name("nearest", sha256="0" * 64)
        assert len({name("nearest"), *others}) == 4


INTERRUPTED = """
import os, signal, sys
import dither
from dither.planning import plan as planning
from dither.planning import sensitivity as sensitivities
from dither.planning.costs import Costs
left = int(sys.argv[2])
save = Costs.save
def saving(self):
    global left
    save(self)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Costs.save = saving
dither.plan(sys.argv[3], size=2500000, evidence=sys.argv[1], solver="nearest",
            types=["Q2_K", "Q4_K", "Q6_K", "Q8_0"])
"""


@pytest.mark.parametrize("moment", [2, 15])  # among divergences (five groups), among ratios
def test_a_killed_measurement_goes_on_to_the_same_plan(
    own_evidence: Path, known: dict[str, Any], moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = planned(2_500_000, known)
    [path] = cost_files(own_evidence)
    forget(own_evidence)
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(own_evidence), str(moment), str(BUNDLED)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    kept = json.loads(path.read_text())
    assert 0 < len(kept["divergence"]) + sum(map(len, kept["ratios"].values())) < 29 * 5
    again: list[str] = []
    measure, solve = sensitivity.divergences, sensitivities.error_ratios

    def listening(network: Any, probe: Any, names: Any, *others: Any) -> None:
        again.extend(name for name in names if name in kept["divergence"])
        measure(network, probe, names, *others)

    def solving(tensor: Any, kinds: Any, *others: Any) -> dict[str, float]:
        again.extend(f"{tensor.name} {kind}" for kind in kinds if kind in kept["ratios"].get(tensor.name, ()))
        return solve(tensor, kinds, *others)

    monkeypatch.setattr(sensitivity, "divergences", listening)
    monkeypatch.setattr(sensitivities, "error_ratios", solving)
    resumed = planned(2_500_000, known, evidence=own_evidence)
    assert again == []
    assert [t.type for t in resumed.plan.tensors.values()] == [t.type for t in whole.plan.tensors.values()]
    assert resumed.plan.kl == pytest.approx(whole.plan.kl, rel=1e-6)
    assert cost_files(own_evidence) == [path]  # neither probe nor part of one stays behind


class TestReplay:
    @pytest.fixture
    def plan_file(self, known: dict[str, Any], tmp_path: Path) -> Path:
        planned(2_500_000, known, out=tmp_path / "p.toml")
        return tmp_path / "p.toml"

    def made(self, plan: Path, out: Path, known: dict[str, Any], **others: Any) -> dither.Result:
        return dither.quantize(ORIGINAL, plan=plan, out=out, evidence=known["evidence"], **others)

    def test_a_plan_replayed_gives_the_same_bytes(self, plan_file: Path, known: dict[str, Any], tmp_path: Path) -> None:
        paths = [tmp_path / f"{threads}.gguf" for threads in (1, 2)]
        for threads, path in enumerate(paths, 1):
            self.made(plan_file, path, known, threads=threads)
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_the_file_names_its_plan(self, plan_file: Path, known: dict[str, Any], tmp_path: Path) -> None:
        self.made(plan_file, tmp_path / "m.gguf", known)
        recipe = json.loads(gguf.GGUFReader(tmp_path / "m.gguf").fields["dither.recipe"].contents())
        types = {name: t.type for name, t in read_plan(plan_file).tensors.items()}
        decides = {"tensors": types, "solver": "nearest", "transforms": []}
        right = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        assert (recipe["to"], recipe["plan"], recipe["solver"]) == ("plan", right, "nearest")
        assert dither.inspect(tmp_path / "m.gguf").file_type == "plan"
        assert dither.inspect(tmp_path / "m.gguf").made_by["recipe"]["plan"] == right
        measured = dither.measure(tmp_path / "m.gguf", BUNDLED, tokens=256, context=128, save=False)
        assert [found.type for found in measured] == ["plan"]

    def test_a_file_made_of_it_by_a_preset_is_the_presets(
        self, plan_file: Path, known: dict[str, Any], tmp_path: Path
    ) -> None:
        self.made(plan_file, tmp_path / "m.gguf", known)
        dither.quantize(tmp_path / "m.gguf", "Q8_0", tmp_path / "q8.gguf")
        assert dither.inspect(tmp_path / "q8.gguf").file_type == "Q8_0"

    def test_edited_types_are_what_is_written(self, plan_file: Path, known: dict[str, Any], tmp_path: Path) -> None:
        lines = plan_file.read_text().splitlines(keepends=True)
        edited = []
        for line in lines:
            if line.startswith('"blk.1.ffn_down.weight"'):
                kind = read_plan(plan_file).tensors["blk.1.ffn_down.weight"].type
                line = line.replace(f'"{kind}"', '"q5_k"')
            edited.append(line)
        (tmp_path / "e.toml").write_text("".join(edited))
        self.made(tmp_path / "e.toml", tmp_path / "e.gguf", known)
        planned_types = {name: t.type for name, t in read_plan(plan_file).tensors.items()}
        right = planned_types | {"blk.1.ffn_down.weight": "Q5_K"}
        on_disk = types_on_disk(tmp_path / "e.gguf")
        assert {name: on_disk[name] for name in right} == right
        recipe = json.loads(gguf.GGUFReader(tmp_path / "e.gguf").fields["dither.recipe"].contents())
        assert recipe["plan"] == plan_sha256(read_plan(tmp_path / "e.toml"))
        assert recipe["plan"] != plan_sha256(read_plan(plan_file))

    @pytest.mark.parametrize(
        "others",
        [
            {"to": "Q4_K_M"},
            {"tensors": [("ffn", "Q8_0")]},
            {"pure": True},
            {"output_type": "Q6_K"},
            {"embedding_type": "Q6_K"},
            {"bits": 4},
            {"bits": 0},
            {"group": 128},
            {"group": 0},  # the whole row, not nothing
            {"sym": True},
            {"sym": False},
            {"act_order": True},
            {"dtype": "F16"},
        ],
    )
    def test_types_cannot_be_named_twice(
        self, plan_file: Path, known: dict[str, Any], tmp_path: Path, others: dict[str, Any]
    ) -> None:
        [name] = others
        with pytest.raises(UsageError, match=f"--plan: names every tensor's type already.*`{name}`"):
            self.made(plan_file, tmp_path / "m.gguf", known, **others)
        assert not list(tmp_path.glob("m.gguf*"))

    def test_a_plan_of_a_gguf_stays_one_where_a_folders_format_is_called_like_its_preset(
        self, plan_file: Path, known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dither.quantizing.quantize.nearest_preset", lambda *_: "MXFP4")
        self.made(plan_file, tmp_path / "m.gguf", known)
        assert types_on_disk(tmp_path / "m.gguf")["token_embd.weight"] == (
            read_plan(plan_file).tensors["token_embd.weight"].type
        )

    def test_another_models_plan_is_refused(self, plan_file: Path, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is for demo_model, not for tiny-llama"):
            dither.quantize(checkpoint, plan=plan_file, out=tmp_path / "m.gguf")
        assert not list(tmp_path.glob("m.gguf*"))

    def test_a_plan_of_tensors_that_are_not_there_is_refused(
        self, plan_file: Path, known: dict[str, Any], tmp_path: Path
    ) -> None:
        plan = read_plan(plan_file)
        odd = replace(plan, tensors={**plan.tensors, "blk.9.x.weight": plan.tensors["token_embd.weight"]})
        with pytest.raises(UsageError, match=r"blk.*9.*matches no tensor"):
            dither.quantize(ORIGINAL, plan=odd, out=tmp_path / "m.gguf", evidence=known["evidence"])

    def test_without_type_or_plan_there_is_nothing_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--to"):
            dither.quantize(ORIGINAL, out=tmp_path / "m.gguf")


def test_a_prediction_is_near_what_is_measured(known: dict[str, Any], tmp_path: Path) -> None:
    """Small divergences add up: held against logits of the whole file, in float64."""
    found = planned(3_400_000, known)
    result = dither.quantize(
        ORIGINAL, plan=found.plan, out=tmp_path / "m.gguf", evidence=known["evidence"], measure=True
    )
    assert result.measurement is not None and found.plan.kl is not None
    assert np.log(result.measurement.kl_mean / found.plan.kl) == pytest.approx(0, abs=np.log(1.6))


def test_the_arguments_of_planning_are_those_documented() -> None:
    shared = {"evidence", "solver", "transforms", "types", "threads", "device", "force", "progress"}
    for job in (dither.plan, dither.quantize_within, dither.ladder):
        assert shared <= python_inspect.signature(job).parameters.keys()


def test_without_torch_it_says_how_to_get_it(own_evidence: Path) -> None:
    for known in own_evidence.glob("sensitivity.*"):
        known.unlink()
    code = (
        "import sys; sys.modules['torch'] = None\nimport dither\n"
        "try:\n    dither.plan(sys.argv[1], bpw=4, evidence=sys.argv[2], solver='nearest')\n"
        "except dither.DitherError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BUNDLED), str(own_evidence)], capture_output=True, text=True, check=True
    )
    assert "needs torch, which is not installed" in done.stdout
    assert "pip install 'dither[calibrate]'" in done.stdout
