"""What is found out about a machine, and what a person's word changes about it."""

from __future__ import annotations

import doctest
import json
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from dither.capacity import machine
from dither.capacity.machine import detect

GIB = 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dither" / "bandwidth.json"


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists two cards."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564'\necho 'Mystery Card, 8192'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def test_memory_is_what_the_system_reports() -> None:
    total, free = machine.system_memory()
    assert total <= psutil.virtual_memory().total
    assert free is None or 0 < free <= total


def test_bandwidth_is_measured_once_and_remembered(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(machine, "measure_bandwidth", lambda cores: calls.append(cores) or 12e9)
    assert machine.memory_bandwidth("CPU A", 2) == machine.memory_bandwidth("CPU A", 2) == 12e9
    assert calls == [2] and json.loads(own_cache.read_text()) == {"CPU A, 2 cores": 12e9}
    machine.memory_bandwidth("CPU B", 2)
    assert len(calls) == 2 and len(json.loads(own_cache.read_text())) == 2
    own_cache.write_text("{damaged")
    assert machine.memory_bandwidth("CPU A", 2) == 12e9


def test_a_measured_bandwidth_is_one() -> None:
    assert 1e8 < machine.measure_bandwidth(1, seconds=0.05) < 1e13


def test_cards_are_listed_with_their_makers_bandwidth(cards: None) -> None:
    found = detect(bandwidth=False)
    assert [(gpu.name, gpu.bytes) for gpu in found.gpus] == [
        ("NVIDIA GeForce RTX 4090", 24564 * 2**20),
        ("Mystery Card", 8 * GIB),
    ]
    assert (found.gpus[0].bandwidth, found.gpus[0].how_bandwidth) == (1008e9, "literature")
    assert found.gpus[1].bandwidth is None


def test_what_a_person_says_replaces_what_is_found(cards: None) -> None:
    told = detect(memory=4 * GIB, vram=2 * GIB, bandwidth=False)
    assert (told.memory.bytes, told.memory.how_bytes, told.free) == (4 * GIB, "told", None)
    assert [(gpu.bytes, gpu.how_bytes) for gpu in told.gpus] == [(2 * GIB, "told")]
    assert detect(vram=0, bandwidth=False).gpus == ()


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA GeForce RTX 4060 Ti", 288),
        ("Apple M1 Max", 400),
        ("Apple M1", 68),
        ("Tesla V100-SXM2-16GB", 900),
    ],
)
def test_the_right_card_of_similar_names(name: str, gigabytes: int) -> None:
    assert machine.card_bandwidth(name) == gigabytes * 1e9


@pytest.mark.parametrize(
    "name",
    [
        "capacity.machine",
        "capacity.recommendation",
        "cli.fit",
        "models.outline",
        "models.source",
        "formats.tensor_names",
    ],
)
def test_doctests(name: str) -> None:
    assert doctest.testmod(import_module(f"dither.{name}")).failed == 0
