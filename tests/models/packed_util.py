"""Quantized folders made by the layouts, each beside a dense twin of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Parts = Mapping[str, np.ndarray]
Pack = Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]  # module, weight → parts, the same de-quantized


def as_tensors(parts: Parts, floats: Mapping[str, torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    """uint16 is bfloat16's bits; `floats` says which uint8 parts are floats of eight bits."""
    found = {}
    for suffix, array in parts.items():
        tensor = torch.from_numpy(np.array(array, order="C"))
        kind = (floats or {}).get(suffix, torch.bfloat16 if array.dtype == np.uint16 else None)
        found[suffix] = tensor.view(kind) if kind else tensor
    return found


def quantized_folder(
    dense: Path,
    folder: Path,
    pack: Pack,
    config: Mapping[str, Any] | None,
    floats: Mapping[str, torch.dtype] | None = None,
    beside: str = "",
) -> Path:
    """Two folders: every projection of `dense` packed in `folder`, de-quantized in `folder`-twin."""
    twin = folder.with_name(f"{folder.name}-twin")
    for target in (folder, twin):
        shutil.copytree(dense, target)
    tensors = load_file(dense / "model.safetensors")
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        packed[name] = plain[name] = tensor
        if "_proj" in name:
            module = name.removesuffix(".weight")
            parts, values = pack(module, tensor.float().numpy())
            del packed[name]
            packed |= {f"{module}.{end}": part for end, part in as_tensors(parts, floats).items()}
            plain[name] = torch.from_numpy(values.astype(np.float32))
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    if beside:
        (folder / beside).write_text(json.dumps(config))
    else:
        changed = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(changed | {"quantization_config": config}))
    return folder
