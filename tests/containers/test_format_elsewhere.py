"""A new format of folders is a file for each of its sides, wherever on the search path they lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dither.containers.folders import schemes

SCHEME = """
from dither.containers.folders.awq import AwqFolder

class MyFolder(AwqFolder):
    name, title, words = "mine", "Mine", "AWQ under another name"

    def config(self, modules, plain, wish):
        return {**super().config(modules, plain, wish), "quant_method": "my-method"}

SCHEMES = (MyFolder(),)
"""
READER = """
from dither.models.packed import awq

METHODS = {"my-method": awq.join}
"""
LAYOUT = """
from dither.formats.layouts.methods import Method

METHODS = (Method("my-method", "My method", vllm="mine"),)
"""
USE = """
import sys
from pathlib import Path

import numpy as np

import dither
from dither.engines.vllm import accepted

folder = Path(sys.argv[1])
original = str(Path(dither.__file__).parent / "demo_model")
dither.quantize(original, "mine", folder / "mine")
dither.quantize(original, "awq", folder / "awq")
mine, awq = (dither.open_model(folder / name).tensors for name in ("mine", "awq"))
assert [tensor.stored for tensor in mine] == [tensor.stored for tensor in awq]
assert all(np.array_equal(a.read(0, 8), b.read(0, 8)) for a, b in zip(mine, awq) if len(a.shape) > 1)
print(*accepted(folder / "mine"))
"""


def test_a_format_elsewhere_is_written_read_and_handed_on(tmp_path: Path) -> None:
    for room, text in (("containers/folders", SCHEME), ("models/packed", READER), ("formats/layouts", LAYOUT)):
        place = tmp_path / "elsewhere" / "dither" / room / "mine.py"
        place.parent.mkdir(parents=True)
        place.write_text(text)
    paths = [str(tmp_path / "elsewhere"), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "mine []\n"), run.stderr
    assert "mine" not in schemes()


def test_what_most_engines_read_is_listed_first() -> None:
    names = list(schemes())
    assert names[:2] == ["awq", "gptq"] and names[-1] == "safetensors"
    assert all(scheme.words and scheme.title for scheme in schemes().values())


def test_the_documentation_names_every_format_that_is_written() -> None:
    table = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    missing = [name for name, scheme in schemes().items() if scheme.quantizes and f"`{name}`" not in table]
    assert not missing
