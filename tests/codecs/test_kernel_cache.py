"""Where compiled kernels cannot be kept (no home, a package that cannot be written), work goes on without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of numba's places only the one that the environment names is left, as where neither the package nor a home can be
# written.  (Taking rights away would not do: tests may run as root.)
NOWHERE = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]
"""


def run(code: str, temporary: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    given |= {"TMPDIR": str(temporary), "HOME": str(temporary / "none"), **environment}
    words = [sys.executable, "-c", NOWHERE + code]
    return subprocess.run(words, env=given, cwd=temporary, capture_output=True, text=True, check=False)


SUM = """
import numpy as np
from dither.codecs import kernels
from dither.codecs.kernels import stats
print(stats.sum_squares(np.full(3, 2, dtype=np.float32)), kernels.THIS_RUN)
"""


@pytest.mark.slow
def test_kernels_are_compiled_for_this_run_alone(tmp_path: Path) -> None:
    ended = run(SUM, tmp_path)
    assert ended.returncode == 0, ended.stderr
    total, folder = ended.stdout.split()
    assert float(total) == 12 and Path(folder).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_environment_names_is_taken(tmp_path: Path) -> None:
    ended = run("from dither.codecs import kernels; print(kernels.THIS_RUN)", tmp_path, NUMBA_CACHE_DIR=str(tmp_path))
    assert ended.stdout.split() == ["None"], ended.stderr


def test_where_nothing_can_be_written_it_says_what_to_do(tmp_path: Path) -> None:
    full = "import tempfile\ndef none(*_, **__): raise FileNotFoundError(2, 'No usable temporary directory')\n"
    command = "tempfile.mkdtemp = none\nimport sys\nfrom dither.__main__ import main\n"
    model = Path(__file__).parents[2] / "src" / "dither" / "demo_model"
    words = ["quantize", str(model), "--to", "Q4_0", "-o", str(tmp_path / "a.gguf"), "--json"]
    ended = run(f"{full}{command}main({words!r})", tmp_path)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["thing"] == "compiled kernels" and "NUMBA_CACHE_DIR" in error["way_out"]


def test_the_doctor_tells(tmp_path: Path) -> None:
    nowhere = "import os, pathlib\nfrom dither.codecs import kernels\nfrom dither.cli import doctor\n"
    nowhere += "import tempfile\ndef refuse(*_, **__): raise PermissionError(13, 'Permission denied')\n"
    nowhere += "tempfile.TemporaryFile = refuse\nprint(doctor._kernel_cache().state, os.environ['NUMBA_CACHE_DIR'])\n"
    ended = run(nowhere, tmp_path)
    assert ended.stdout.split()[0] == "missing", ended.stderr
