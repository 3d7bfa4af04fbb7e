"""Transforms by name: those of the folder, and one in a folder elsewhere on Python's search path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dither.errors import UsageError
from dither.models.arch import feeds
from dither.transforms import find_transform, transform_names
from dither.transforms.awq import Awq
from dither.transforms.rotate import Rotate

HALVED = '''
from dataclasses import replace

from dither.types import Transformed


class Halved:
    """Halves the output matrix, which is no transform that anybody should use."""

    name = "half-output"
    needs = frozenset()

    def __init__(self, feeds, *, threads, seed):
        self.given = [len(feeds) > 0, threads, seed]

    def __call__(self, model, evidence, codec_of):
        kinds = {t.name: codec_of(t.name).name for t in model.tensors}
        tensors = tuple(
            replace(t, read=lambda start, stop, t=t: t.read(start, stop) / 2) if t.name == "token_embd.weight" else t
            for t in model.tensors
        )
        record = {"given": self.given, "embedding": kinds["token_embd.weight"]}
        return Transformed(replace(model, tensors=tensors), evidence, record, ("halved",))


TRANSFORM = Halved
'''
USED = """
import json, sys
from pathlib import Path
import dither
from dither.models.gguf_source import open_gguf
from dither.transforms import transform_names

bundled = Path(dither.__file__).parent / "demo_model"
plain, halved = (
    dither.quantize(bundled, "F32", f"{sys.argv[1]}/{name}.gguf", transforms=names, threads=2)
    for name, names in (("plain", ()), ("halved", ("half-output",)))
)
tensors = [{t.name: t for t in open_gguf(Path(result.path)).tensors} for result in (plain, halved)]
first, second = (of["token_embd.weight"].read(0, 9) for of in tensors)
print(json.dumps([transform_names(), dict(halved.transforms), [*halved.notes], bool((first == 2 * second).all())]))
"""


def test_names_and_classes() -> None:
    assert transform_names() == ("awq", "rotate")
    given = feeds("llama")
    assert isinstance(find_transform("awq", given, threads=2), Awq)
    assert isinstance(find_transform("rotate", given, seed=3), Rotate)
    for name in transform_names():
        assert find_transform(name, given).name == name
    with pytest.raises(UsageError, match="--transform shake: is not one of awq, rotate"):
        find_transform("shake", given)


def test_what_transforms_need_is_what_they_refuse_to_do_without() -> None:
    """A rotation draws its matrix; scales follow the inputs."""
    needs = {name: find_transform(name, feeds("llama")).needs for name in transform_names()}
    assert needs == {"awq": {"mean_square"}, "rotate": set()}


def test_a_new_transform_is_one_new_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "dither" / "transforms"
    mine.mkdir(parents=True)
    (mine / "half_output.py").write_text(HALVED)
    path = os.pathsep.join([str(tmp_path / "mine"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", USED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = (
        '[["awq", "half-output", "rotate"], {"half-output": {"given": [true, 2, 0], "embedding": "F32"}}, '
        '["halved"], true]'
    )
    assert done.stdout.strip().splitlines()[-1] == expected
