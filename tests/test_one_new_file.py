"""A codec, a solver, a transform, a format of folders, a family and a command: each one new file, elsewhere.

Six files in a folder on Python's search path, used together by one command line; what comes out is held against
the same arithmetic written out in numpy.  CONTRIBUTING.md describes what stands here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import write_checkpoint

FILES = {
    "codecs/sign.py": '''
"""One bit: every weight of 32 becomes plus or minus the mean of their sizes."""

import numpy as np

from dither.codecs.base import OneScale, SplitBlocks

FAMILY = "sign-g32"


class Sign(SplitBlocks):
    name, block, block_bytes = "sign-g32", 32, 8

    def fit(self, w_RB, importance_B):
        return OneScale(np.abs(w_RB).mean(axis=1))

    def snap(self, w_RK, grid, at):
        return (w_RK < 0).astype(np.uint8)

    def value(self, codes_RK, grid, at):
        return np.where(codes_RK, -grid.scale_R[:, None], grid.scale_R[:, None]).astype(np.float32)

    def pack(self, codes_RB, grid):
        scales = np.ascontiguousarray(grid.scale_R, np.float32)[:, None].view(np.uint8)
        return np.concatenate([scales, np.packbits(codes_RB, axis=1)], axis=1)

    def unpack(self, raw_RN):
        raw_RN = np.ascontiguousarray(raw_RN)
        return np.unpackbits(raw_RN[:, 4:], axis=1), OneScale(raw_RN[:, :4].copy().view(np.float32)[:, 0])


def parse(name, columns):
    return Sign() if name == FAMILY else None
''',
    "solvers/coarse.py": '''
"""Weights are cut to multiples of 1/64 before the codec rounds them."""

import numpy as np

from dither.types import Solved


class Coarse:
    name, needs = "coarse", frozenset()

    def __init__(self, threads=1):
        pass

    def __call__(self, w_RC, codec, evidence):
        return Solved(codec.encode((np.round(w_RC * 64) / 64).astype(np.float32)), self.name)


SOLVER = Coarse
''',
    "transforms/double.py": '''
"""What goes into the feed-forward's last matrix is doubled, and that matrix halved: the same function."""

from dataclasses import replace

from dither.types import Transformed

FACTORS = {"ffn_up": 2, "ffn_down": 0.5}


class Double:
    name, needs = "double", frozenset()

    def __init__(self, feeds, *, threads=1, seed=0):
        pass

    def __call__(self, model, evidence, codec_of):
        tensors = tuple(scaled(tensor) for tensor in model.tensors)
        return Transformed(replace(model, tensors=tensors), evidence, {"factor": 2.0})


def scaled(tensor):
    factor = next((f for name, f in FACTORS.items() if f".{name}." in tensor.name), None)
    if factor is None:
        return tensor
    return replace(tensor, read=lambda start, stop: tensor.read(start, stop) * factor, read_raw=None, recode=None)


TRANSFORM = Double
''',
    "containers/folders/rounded.py": '''
"""A checkpoint of numbers that have been through a codec: what a research paper publishes."""

from dither.containers.folders.scheme import Scheme
from dither.types import No, Yes


class RoundedFolder(Scheme):
    name, title, words = "rounded", "rounded numbers", "numbers as the codec gives them back"

    def codec(self, wish):
        self.check_no_grid(wish)
        return "sign-g32"

    def can_hold(self, codec, shape):
        return Yes() if codec == "sign-g32" else No(f"{self.title} are of one codec, not {codec}")

    def parts(self, codec, rows, columns, dtype):
        return {"weight": ("F32", (rows, columns))}

    def pack(self, codec, raw_RN, columns, dtype, order_C=None):
        return {"weight": codec.decode(raw_RN)}

    def config(self, modules, plain, wish):
        return {}


SCHEMES = (RoundedFolder(),)
''',
    "models/arch/meadow.py": '''
"""Llama under another name."""

from dither.models.arch.llama import LLAMA

FAMILIES = (LLAMA.variant("Meadow", "MeadowForCausalLM", "meadow"),)
''',
    "cli/greet.py": '''
import typer


def greet(name: str) -> None:
    """Say hello."""
    typer.echo(f"hello {name}")


COMMANDS = {15: greet}
''',
}


def dither(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dither", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "mine" / "dither" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"), prepend=os.pathsep)
    return tmp_path


def signs(w_RC: np.ndarray) -> np.ndarray:
    """What `sign-g32` makes of what `coarse` made of weights, in float64."""
    blocks = np.round(w_RC.astype(np.float64) * 64).reshape(len(w_RC), -1, 32) / 64
    sizes = np.abs(blocks).mean(axis=2, keepdims=True)
    return np.where(blocks < 0, -sizes, sizes).reshape(w_RC.shape)


def test_six_files_elsewhere_make_a_file_together(elsewhere: Path) -> None:
    assert dither("greet", "you", cwd=elsewhere).stdout == "hello you\n"
    listed = re.findall(r"^  (\w+)  +\w", dither("--help", cwd=elsewhere).stdout.partition("Commands:")[2], re.M)
    assert listed[:3] == ["quantize", "greet", "calibrate"]
    options = " ".join(dither("quantize", "--help", cwd=elsewhere).stdout.split())
    assert "coarse, gptq," in options and "awq, double or rotate" in options

    folder = write_checkpoint(elsewhere / "model", hidden=64, ffn=96, layers=2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MeadowForCausalLM"], "model_type": "meadow"}
    (folder / "config.json").write_text(json.dumps(config))
    words = ["quantize", "model", "--to", "rounded", "--solver", "coarse", "--transform", "double", "-o", "out"]
    made = dither(*words, "--json", cwd=elsewhere)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["solver"] == "coarse" and result["transforms"] == {"double": {"factor": 2.0}}

    before, after = (load_file(next((elsewhere / name).glob("*.safetensors"))) for name in ("model", "out"))
    factors = {"up_proj": 2, "down_proj": 0.5}
    rounded = [name for name in before if name.endswith("_proj.weight")]
    assert len(rounded) == 14
    for name in rounded:
        factor = factors.get(name.split(".")[-2], 1)
        np.testing.assert_allclose(after[name], signs(np.float32(before[name]) * factor), rtol=1e-6)


def test_without_them_each_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", hidden=64, ffn=96, layers=2)
    for words in (
        ["--to", "rounded"],
        ["--to", "Q4_0", "--solver", "coarse"],
        ["--to", "Q4_0", "--transform", "double"],
    ):
        refused = dither("quantize", str(folder), *words, cwd=tmp_path)
        assert refused.returncode == 2 and words[-1] in refused.stderr.lower()
