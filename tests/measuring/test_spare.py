"""By default a file is measured on enough text: calibration sets aside what the sequences held back do not give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import BUNDLED
from dither.formats.evidence import EvidenceStore
from dither.measuring import measure
from dither.measuring.calibrate import DEFAULT_TOKENS, calibrate
from dither.measuring.collect import held_back, spare_sequences
from dither.measuring.embedded import held_back_text
from dither.measuring.per_token import scored_positions
from dither.measuring.schema import THIN_TOKENS


@pytest.mark.parametrize("context", [64, 128, 256, 512])
def test_what_is_scored_by_default_is_not_thin(context: int) -> None:
    sequences = DEFAULT_TOKENS // context
    measured = int(held_back(sequences).sum()) + spare_sequences(sequences, context)
    for count in (measured, measure.TOKENS // context):
        assert len(scored_positions(np.full(count, context), None)[0]) >= THIN_TOKENS


def test_little_text_is_not_stretched() -> None:
    assert [spare_sequences(count, 512) for count in (1, 3, 4, 16, 64, 128, 4096)] == [0, 0, 1, 4, 9, 1, 0]


@pytest.mark.slow
def test_calibration_keeps_text_that_it_does_not_run(tmp_path: Path) -> None:
    calibrate(BUNDLED, out=tmp_path / "e", tokens=1024, context=64, hessians=False, seed=3)
    store = EvidenceStore.open(tmp_path / "e")
    spare = store.spare_tokens()
    assert spare is not None and spare[0].shape == (4, 64)
    ran_ST, _ = store.tokens()
    assert not {row.tobytes() for row in spare[0]} & {row.tobytes() for row in ran_ST}
    text = held_back_text(store)
    assert len(text.lengths_S) == 2 + 4
    np.testing.assert_array_equal(text.tokens_ST[:2], ran_ST[np.asarray(held_back(16))])
    np.testing.assert_array_equal(text.tokens_ST[2:], spare[0])
