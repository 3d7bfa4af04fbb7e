"""Old importance matrices of a mixture: E·C values are E rows of C, rows of zeros are experts that saw nothing.

References: the same numbers in the GGUF form, where rows are told apart by the file itself, written by the
`gguf` package; ggml's own encoder given each expert's row, as llama-quantize gives it (`src/llama-quant.cpp`).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from families_util import random_model, save_model
from transformers import MixtralConfig

import dither
from dither.errors import FormatError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.imatrix import read_imatrix
from dither.models.source import open_model
from formats.imatrix_util import dat_bytes, write_gguf

E, C, F = 3, 256, 512
STACKS = {"blk.0.ffn_gate_exps.weight": C, "blk.0.ffn_up_exps.weight": C, "blk.0.ffn_down_exps.weight": F}
DEAD = 1  # an expert that saw no token


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MixtralConfig(
        vocab_size=300, hidden_size=C, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    return save_model(random_model(config), tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def means() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = {name: rng.uniform(0.01, 4, (E, columns)).astype(np.float32) for name, columns in STACKS.items()}
    return rows | {"blk.0.attn_q.weight": rng.uniform(0.01, 4, (1, C)).astype(np.float32)}


def written_as_dat(path: Path, means: dict[str, np.ndarray], calls: int = 8) -> Path:
    path.write_bytes(dat_bytes({name: (calls, list((rows_EC * calls).reshape(-1))) for name, rows_EC in means.items()}))
    return path


def dead(means: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: rows_EC.copy() for name, rows_EC in means.items()}
    for name in STACKS:
        found[name][DEAD] = 0
    return found


def stored(path: str | Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(path).tensors}


def test_rows_are_told_apart_by_the_model(mixture: Path, means: dict[str, np.ndarray], tmp_path: Path) -> None:
    store = EvidenceStore.open(written_as_dat(tmp_path / "m.dat", means))
    store.check(open_model(mixture))
    for name, rows_EC in means.items():
        for expert, row_C in enumerate(rows_EC):
            found = store(name, expert)
            assert found is not None and np.allclose(found.mean_square_C, row_C, rtol=1e-6)


def test_an_old_matrix_makes_the_bytes_of_a_new_one(
    mixture: Path, means: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exact = {
        name: np.ldexp(1.0, np.rint(4 * rows_EC).astype(int)).astype(np.float32) for name, rows_EC in means.items()
    }
    old = written_as_dat(tmp_path / "m.dat", exact, calls=8)  # powers of two: no rounding on either way
    new = write_gguf(tmp_path / "m.gguf", {name: (rows * 8, np.full(len(rows), 8)) for name, rows in exact.items()})
    first = stored(dither.quantize(mixture, "Q4_K_M", tmp_path / "old.gguf", imatrix=old).path)
    second = stored(dither.quantize(mixture, "Q4_K_M", tmp_path / "new.gguf", imatrix=new).path)
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name])


def test_an_expert_that_saw_nothing_is_rounded_plainly(
    mixture: Path, means: dict[str, np.ndarray], tmp_path: Path
) -> None:
    matrix = written_as_dat(tmp_path / "m.dat", dead(means))
    result = dither.quantize(mixture, "Q4_K_M", tmp_path / "guided.gguf", imatrix=matrix)
    assert any("saw no token are rounded plainly" in note and f": {len(STACKS)}, in" in note for note in result.notes)
    guided = stored(result.path)
    plain = stored(dither.quantize(mixture, "Q4_K_M", tmp_path / "plain.gguf").path)
    whole = dither.quantize(mixture, "Q4_K_M", tmp_path / "w.gguf", imatrix=written_as_dat(tmp_path / "w.dat", means))
    seen = stored(whole.path)
    for name in STACKS:
        for expert in range(E):
            same = plain if expert == DEAD else seen
            assert np.array_equal(guided[name][expert], same[name][expert])
            assert not np.array_equal(guided[name][expert], (seen if expert == DEAD else plain)[name][expert])
    assert not any("saw no token" in note for note in whole.notes)


@pytest.mark.slow
def test_every_expert_is_encoded_as_ggml_would_with_its_row(
    mixture: Path, means: dict[str, np.ndarray], tmp_path: Path
) -> None:
    libgguf, name = pytest.importorskip("libgguf"), "blk.0.ffn_up_exps.weight"
    matrix = written_as_dat(tmp_path / "m.dat", dead(means))
    settings = {"tensors": [("ffn_up_exps", "IQ2_XS")]}
    written = stored(dither.quantize(mixture, "Q8_0", tmp_path / "q.gguf", imatrix=matrix, **settings).path)[name]
    source = {tensor.name: tensor for tensor in open_model(mixture).tensors}[name]
    w_EFC = source.read(0, source.rows).reshape(E, F, C)
    rows_EC = dead(means)[name]
    rows_EC[DEAD] = 1  # as llama-imatrix writes it, and llama-quantize where a count is zero
    for expert in range(E):
        expected = libgguf.quantize_rows(w_EFC[expert], gguf.GGMLQuantizationType.IQ2_XS, imatrix=rows_EC[expert])
        assert np.array_equal(written[expert].reshape(F, -1), expected.view(np.uint8).reshape(F, -1))


def test_values_of_another_model_are_refused(mixture: Path, means: dict[str, np.ndarray], tmp_path: Path) -> None:
    name = "blk.0.ffn_up_exps.weight"
    for columns in (C * (E + 1), C * E - 1):  # another number of experts, and no whole rows
        other = written_as_dat(tmp_path / "m.dat", {name: np.ones((1, columns), np.float32)})
        with pytest.raises(UsageError, match=r"ffn_up_exps\.weight: is evidence on"):
            EvidenceStore.open(other).check(open_model(mixture))


def test_zeros_everywhere_are_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is zero throughout"):
        read_imatrix(written_as_dat(tmp_path / "m.dat", {"blk.0.ffn_up_exps.weight": np.zeros((E, C), np.float32)}))
