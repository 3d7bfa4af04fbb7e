"""The page's arithmetic is Python's: equal, not close."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from page_util import run_module

import dither
from dither.capacity.advice import Load, judge
from dither.capacity.constants import constants
from dither.capacity.machine import Device, Machine
from dither.capacity.memory import KV_TYPES, Layer, Memory, Shape, needed
from dither.capacity.quality import Quality
from dither.capacity.recommendation import LADDER, recommended
from dither.capacity.result import Candidate
from dither.reporting.report import fit_input

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/capacity/golden.json").read_text())
GIB = 2**30


def test_the_vectors_give_the_bytes_computed_by_hand() -> None:
    answers = run_module(
        "memory.js",
        "(m, [cases, c]) => cases.map(x => m.needed(x.shape, x.bytes.weights, x.inputs, c))",
        [GOLDEN["cases"], constants()],
    )
    assert answers == [case["bytes"] for case in GOLDEN["cases"]]


def drawn_shape(draw: random.Random) -> Shape:
    layers = tuple(
        Layer(
            keys=draw.choice([0, 64, 192, 1000, 1024]),
            values=draw.choice([0, 64, 1024]),
            window=draw.choice([0, 0, 512, 1000]),
            state=draw.choice([0, 0, 4097]),
        )
        for _ in range(draw.randint(1, 40))
    )
    return Shape(
        layers,
        width=draw.randint(64, 8192),
        inner=draw.randint(64, 28672),
        query=draw.randint(64, 8192),
        head=draw.choice([0, 64, 96, 128, 192]),
        vocabulary=draw.randint(1, 262144),
        experts_used=draw.choice([0, 0, 8]),
        latent=draw.choice([0, 0, 24576]),
        scan=draw.choice([0, 5120]),
        merges=draw.random() < 0.5,
    )


def test_shapes_and_wishes_drawn_at_random_agree() -> None:
    draw = random.Random(6)
    cases, expected = [], []
    for _ in range(300):
        shape = drawn_shape(draw)
        wish = {"context": draw.randint(1, 200_000), "kv": draw.choice(list(KV_TYPES)), "slots": draw.randint(1, 64)}
        weights = draw.randint(0, 2**40)
        cases.append([asdict(shape), weights, wish])
        memory = needed(shape, weights, **wish)
        expected.append({**asdict(memory), "total": memory.total})
    body = "(m, [cases, c]) => cases.map(([s, w, wish]) => m.needed(s, w, wish, c))"
    assert run_module("memory.js", body, [cases, constants()]) == expected


def drawn_machine(draw: random.Random) -> Machine:
    memory = draw.randint(1, 128) * GIB
    free = draw.choice([None, draw.randint(0, memory)])
    bandwidth = draw.choice([None, draw.uniform(1e10, 8e11)])
    card = Device("card", draw.randint(1, 80) * GIB, bandwidth=draw.choice([None, 1.008e12]))
    unified = draw.random() < 0.2
    gpus = (card,) * (1 if unified else draw.randint(0, 3))
    return Machine("cpu", 4, Device("RAM", memory, bandwidth=bandwidth), gpus, unified, free)


def drawn_load(draw: random.Random) -> Load:
    weights = draw.randint(2**20, 90 * GIB)
    rest = (draw.randint(0, 20 * GIB), draw.randint(0, 2 * GIB), draw.randint(0, GIB // 4))
    embedding = draw.choice([0, weights // 11])
    return Load(Memory(weights, *rest), draw.randint(1, 120), weights - embedding, draw.randint(1, 262144), embedding)


def machine_json(machine: Machine) -> dict[str, Any]:
    gpus = [{"bytes": gpu.bytes, "bandwidth": gpu.bandwidth} for gpu in machine.gpus]
    own = machine.memory
    return {
        "memory": own.bytes,
        "free": machine.free,
        "bandwidth": own.bandwidth,
        "gpus": gpus,
        "unified": machine.unified,
    }


def test_verdicts_and_speeds_are_the_same() -> None:
    draw = random.Random(7)
    pairs = [(drawn_load(draw), drawn_machine(draw)) for _ in range(500)]
    asked = [
        [{**asdict(load), "memory": {**asdict(load.memory), "total": load.memory.total}}, machine_json(machine)]
        for load, machine in pairs
    ]
    expected = []
    for load, machine in pairs:
        verdict = judge(load, machine)
        speed = asdict(verdict.speed) if verdict.speed else None
        expected.append([verdict.word, verdict.gpu_layers, speed, verdict.why_no_speed])
    body = """(m, [pairs, c]) => pairs.map(([load, machine]) => {
        const v = m.judge(load, machine, c);
        return [v.word, v.gpuLayers, v.speed, v.whyNoSpeed];
    })"""
    assert run_module("memory.js", body, [asked, constants()]) == expected
    assert {word for word, *_ in expected} == {"GPU", "part in RAM", "RAM", "from disk", "no"}


def test_the_choice_is_the_same() -> None:
    draw = random.Random(8)
    sets, expected = [], []
    for _ in range(200):
        names = draw.sample(LADDER, draw.randint(1, len(LADDER)))
        judged, choices = [], []
        machine = drawn_machine(draw)
        for name in names:
            load, known, importance = drawn_load(draw), draw.random() < 0.7, draw.random() < 0.3
            bits = draw.uniform(2, 9)
            verdict = judge(load, machine)
            weights, quality = load.memory.weights, Quality(0.1, "literature", "") if known else None
            choices.append(Candidate(name, None, bits, load.memory, verdict, quality, importance))
            speed = asdict(verdict.speed) if verdict.speed else None
            judged.append(
                {
                    "type": name,
                    "bytes": weights,
                    "bpw": bits,
                    "needsImportance": importance,
                    "known": known,
                    "verdict": {"word": verdict.word, "speed": speed},
                }
            )
        sets.append(judged)
        best = recommended(choices)
        expected.append(best.type if best else None)
    body = "(m, [sets, c]) => sets.map(x => { const best = m.choose(x, c); return best && best.type; })"
    assert run_module("memory.js", body, [sets, constants()]) == expected


@pytest.mark.parametrize("wish", [{}, {"context": 700, "kv": "q8_0", "slots": 3}])
def test_the_document_holds_all_that_the_page_needs(wish: dict[str, Any]) -> None:
    """The bundled model, judged from the document alone, against `dither.fit`."""
    found = dither.fit(ROOT / "src/dither/demo_model", memory="16GiB", vram="2GiB", **wish)
    part = json.loads(fit_input(found).model_dump_json())
    body = """(m, [fit, wish, machine]) => fit.weights.map(w => {
        const memory = m.needed(fit.shape, w.bytes, wish, fit.constants);
        const load = {memory, layers: m.layerCount(fit.shape), active: w.active,
                      vocabulary: fit.shape.vocabulary, embedding: w.embedding};
        const v = m.judge(load, machine, fit.constants);
        return [w.type, memory.total, v.word, v.speed && v.speed.likely];
    })"""
    full = {"context": found.context, "kv": found.kv, "slots": found.slots}
    rows = run_module("memory.js", body, [part, full, machine_json(found.machine)])
    assert rows == [
        [c.type, c.memory.total, c.verdict.word, c.verdict.speed.likely if c.verdict.speed else None]
        for c in found.candidates
    ]
