"""A shelf of quantized files with measurements beside them, made in a second."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf

import dither
from dither.measuring import schema
from dither.measuring.build import content_sha256
from dither.measuring.schema import Measurement
from dither.models.source import open_model

ENDS = ("kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "delta_p_mean", "delta_p_rms")


def measured(path: Path, kl: float = 0.01, **changes: Any) -> Measurement:
    """A measurement of a file that is there: its own bytes, type and hash, and numbers made up."""
    model = open_model(path)
    size = sum(tensor.stored_bytes for tensor in model.tensors)
    field = model.metadata.get("general.file_type")
    kind = gguf.LlamaFileType(field.value).name.removeprefix("MOSTLY_") if field else "int4-g128"
    numbers: dict[str, Any] = {f"{key}{end}": 0.1 for key in ENDS for end in ("", "_low", "_high")}
    numbers |= {"kl_mean": kl, "kl_mean_low": 0.9 * kl, "kl_mean_high": 1.1 * kl}
    numbers |= {"same_top": 0.9, "same_top_low": 0.88, "same_top_high": 0.92}
    numbers |= {"ppl": 10.5, "ppl_low": 10.0, "ppl_high": 11.0, "ppl_reference": 10.0}
    numbers |= {"ppl_reference_low": 9.5, "ppl_reference_high": 10.5}
    numbers |= {"ppl_ratio": 1.05, "ppl_ratio_low": 1.04, "ppl_ratio_high": 1.06}
    about: dict[str, Any] = {
        "tool": "dither 0.1.0",
        "file": path.name,
        "file_sha256": content_sha256(model),
        "type": kind,
        "bytes": size,
        "bpw": 8 * size / model.parameters,
        "reference": "tiny-llama",
        "data": "novel.txt",
        "data_sha256": "ef" * 32,
        "context": 128,
        "sequences": 16,
        "tokens": 1024,
    }
    return Measurement(**{**numbers, **about, **changes})


def save(path: Path, kl: float = 0.01, **changes: Any) -> Path:
    place = schema.path_for(path)
    schema.save(measured(path, kl, **changes), place)
    return place


def fill(folder: Path, checkpoint: Path) -> Path:
    """`folder/tiny-llama`, the original, and `folder/files` with what was made of it; returns the latter."""
    shutil.copytree(checkpoint, folder / "tiny-llama")
    files = folder / "files"
    files.mkdir()
    for kind, kl in (("Q8_0", 0.0004), ("Q5_K_M", 0.004), ("Q4_K_M", 0.03), ("Q2_K", 0.4)):
        save(Path(dither.quantize(folder / "tiny-llama", kind, files / f"tiny-{kind}.gguf").path), kl)
    dither.quantize(folder / "tiny-llama", "Q3_K_M", files / "tiny-Q3_K_M.gguf")  # not measured
    save(Path(dither.quantize(folder / "tiny-llama", "gptq", files / "tiny-gptq").path), 0.02)
    return files
