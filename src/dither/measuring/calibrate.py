"""Calibrate: run text through a model and keep statistics of each linear layer's input.

One decoder block is in memory at a time (`measuring.walk`).  All sequences go through block 0, batch by batch,
while a `Collector` sums the inputs of its layers; the statistics are written, the block is dropped, and the hidden
states that left it enter block 1; the output matrix's input comes last.  With `gradients` a second walk, back from
the predictions (`measuring.backward`), collects the gradients of a loss at each layer's output.

Legend: S sequences, T token positions, E experts, C columns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from dither._version import __version__
from dither.engines.vocabulary import vocabulary_fingerprint
from dither.errors import DitherError, OutputError, UsageError
from dither.formats.arrays import read_members
from dither.formats.evidence import (
    IMATRIX,
    TOKENS,
    EvidenceStore,
    model_identity,
    weights_sample,
    write_arrays,
    write_manifest,
)
from dither.formats.imatrix import write_imatrix
from dither.formats.tensor_names import block_of
from dither.measuring.calibration_folder import Folder
from dither.measuring.text import BATCH_TOKENS, SELF, Sequences, checked_context, pack, sequences, tokens_sha256
from dither.measuring.written import WRITTEN
from dither.models.blocks import open_blocks
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.types import Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dither.measuring.walk import Walk

DEFAULT_TOKENS = 2**15
_SHOWN_EXPERTS = 8


@dataclass(frozen=True)
class Calibration:
    """What was collected, and where it is.

    `few` names, for each layer with experts, those that saw fewer than 256 tokens; `seconds` is the time of the
    run, without that of an interrupted one before it.
    """

    path: str
    model: str
    data: str
    tokens: int
    sequences: int
    context: int
    blocks: int
    tensors: int
    bytes: int
    hessians: bool
    gradients: bool
    seconds: float
    resumed: int  # blocks that an interrupted run had finished
    few: dict[str, list[int]]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes)}


class Keywords(TypedDict, total=False):
    """How a calibration runs, not what it computes."""

    device: str  # "cpu"
    threads: int | None  # of torch and llama.cpp
    batch: int  # tokens that go through a block at once
    progress: Progress | None


@dataclass(frozen=True)
class _Running:
    """`Keywords` with their defaults."""

    device: str = "cpu"
    threads: int | None = None
    batch: int = BATCH_TOKENS
    progress: Progress | None = None


def calibrate(
    model: str | Path | Model,
    data: str | Path = SELF,
    *,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    hessians: bool = True,
    gradients: bool = False,
    out: str | Path = "evidence",
    seed: int = 0,
    force: bool = False,
    **how: Unpack[Keywords],
) -> Calibration:
    """Runs `tokens` tokens of `data` through `model` and writes the evidence folder `out`.

    `data` is a text file, a file of JSON lines, `hf:DATASET[:SPLIT[:COLUMN]]`, or `self`: text that the model
    writes with `seed`.  `context` is tokens per sequence (512, or the model's).  Without `hessians` only mean
    squares are kept, as in llama.cpp's importance matrix.  With `gradients` the text also goes back through the
    blocks: tokens are weighted in the Hessians by how much they matter, and output Hessians tell error feedback
    which errors cancel.  That takes about three times as long, and disk space for the hidden states of all
    blocks, 4 bytes × tokens × width × blocks.  `force` replaces existing evidence.

    Further keywords: `device` ("cpu"), `threads` (of torch and llama.cpp; all), `batch` (tokens that go through a
    block at once; 2048), `progress`.

    Raises UsageError (the request), SourceError (model or text), UnsupportedError (the architecture),
    OutputError (the folder, the disk): before any work if it can be known by then.
    """
    started = time.monotonic()
    running = _Running(**how)
    report = running.progress or Silent()
    if gradients and not hessians:
        raise UsageError("--gradients", "weights tokens in the Hessians, so it needs them", "Leave out --no-hessians.")
    opened = model if isinstance(model, Model) else open_model(model)
    context = checked_context(opened, tokens, context)
    blocks = open_blocks(opened, device=running.device)
    request = {
        "model": opened.fingerprint,
        "data": str(data),
        "tokens": tokens,
        "context": context,
        "seed": seed,
        "hessians": hessians,
        "gradients": gradients,
        "batch": running.batch,
        "device": running.device,
        "version": __version__,
    }
    from dither.measuring.backward import BackwardWalk
    from dither.measuring.walk import Walk
    from dither.solvers.learned import torch_threads

    threads = nullcontext() if running.threads is None else torch_threads(running.threads)
    with Folder(Path(out).expanduser(), force=force) as folder, threads:
        continued = folder.continues(request)
        if folder.discarded:
            report.note("An unfinished calibration with other settings was discarded.")
        text = _text(folder, opened, data, tokens, context, seed, running)
        walk = (BackwardWalk if gradients else Walk)(opened, blocks, text, folder, hessians, running.batch, report)
        for note in walk.notes:
            report.note(note)
        resumed = walk.run(afresh=not continued)
        manifest = _manifest(walk)
        _write_importance(folder.path, manifest, text)
        write_manifest(folder.path, manifest)
        walk.remove()
        folder.tidy()
    return _summary(folder.path, manifest, time.monotonic() - started, resumed)


def _text(
    folder: Folder, model: Model, data: str | Path, tokens: int, context: int, seed: int, running: _Running
) -> Sequences:
    """The sequences to run: those an interrupted run let the model write, because writing takes minutes, whole or
    as far as they go."""
    kept = folder.state.get("text")
    if kept is not None and str(data) == SELF and (folder.path / TOKENS).is_file():
        members = read_members(folder.path / TOKENS)
        tokens_ST, lengths_S = members["tokens_ST"].read(), members["lengths_S"].read()
        if tokens_sha256(tokens_ST, lengths_S) == kept["sha256"]:
            return Sequences(tokens_ST, lengths_S, kept["name"], kept["sha256"], kept["seed"], tuple(kept["notes"]))
    from dither.measuring.collect import spare_sequences

    how: dict[str, Any] = {"threads": running.threads, "progress": running.progress}
    how["spare"] = spare_sequences(tokens // context, context)
    if str(data) == SELF:
        folder.save()  # what is asked for, so that a later run knows whose the text is that is written from now on
    try:
        text = sequences(model, data, tokens=tokens, context=context, seed=seed, scratch=folder.path, **how)
    except OutputError:
        raise
    except DitherError:
        if str(data) == SELF and not (folder.path / WRITTEN).exists():  # nothing that a later run could go on from
            folder.clear()
        raise
    if kept is not None and kept["sha256"] != text.sha256:
        (running.progress or Silent()).note("The text has changed since the unfinished calibration: it starts over.")
        folder.state.update(files={}, few={})
    arrays = {"tokens_ST": text.tokens_ST, "lengths_S": text.lengths_S}
    if text.spare:
        more = pack(map(list, text.spare), text.name, seed)
        arrays |= {"spare_ST": more.tokens_ST, "spare_lengths_S": more.lengths_S}
    write_arrays(folder.path / TOKENS, arrays)
    folder.state["text"] = {"name": text.name, "sha256": text.sha256, "seed": seed, "notes": list(text.notes)}
    folder.save()
    folder.forget_writing()
    return text


def _manifest(walk: Walk) -> dict[str, Any]:
    """The description of the evidence; nothing in it depends on when or how often the run was interrupted."""
    state, text, model = walk.folder.state, walk.text, walk.model
    few = _few_note(state["few"])
    return {
        "dither": __version__,
        "model": model.name,
        "arch": model.arch,
        "model_identity": model_identity(model),
        "weights_sample": weights_sample(model),
        "vocabulary": vocabulary_fingerprint(model),
        "data": {
            "name": text.name,
            "sha256": text.sha256,
            "seed": text.seed,
            "tokens": text.tokens,
            "sequences": len(text.lengths_S),
            "context": int(text.tokens_ST.shape[1]),
            "held_back": int(walk.collector().held_S.sum()),
        },
        "hessians": walk.hessians,
        "gradients": walk.gradients,
        "blocks": walk.network.count,
        "files": state["files"],
        "few": state["few"],
        "notes": [*walk.notes, *([few] if few else [])],
    }


def _few_note(few: Mapping[str, list[int]]) -> str:
    """One line for all experts that saw few tokens."""
    from dither.measuring.collect import FEW

    layers = {f"blk.{block_of(name)}": experts for name, experts in few.items()}
    named = [f"{layer} expert {expert}" for layer, experts in layers.items() for expert in experts]
    if not named:
        return ""
    shown = ", ".join(named[:_SHOWN_EXPERTS]) + (" …" if len(named) > _SHOWN_EXPERTS else "")
    return f"{len(named)} experts saw fewer than {FEW} tokens, filled up from their layer's pool: {shown}."


def _write_importance(folder: Path, manifest: Mapping[str, Any], text: Sequences) -> None:
    """Writes the mean squares once more, for llama.cpp.  An expert without tokens gets a count of one: its values
    came from the pool, and with a count of zero they would be ignored."""
    means: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for file, groups in manifest["files"].items():
        members = read_members(folder / file)
        for i, group in enumerate(groups):
            mean_EC, counts_E = members[f"{i}.mean_square"].read(), members[f"{i}.counts"].read()
            for tensor in group["tensors"]:
                means[tensor], counts[tensor] = mean_EC, np.maximum(counts_E, 1)
    sequences, context = text.tokens_ST.shape
    write_imatrix(folder / IMATRIX, means, counts, datasets=[text.name], chunks=sequences, context=context)


def _summary(folder: Path, manifest: Mapping[str, Any], seconds: float, resumed: int) -> Calibration:
    data = manifest["data"]
    return Calibration(
        path=str(folder),
        data=data["name"],
        tensors=len(EvidenceStore.open(folder).tensors),
        bytes=sum(entry.stat().st_size for entry in folder.iterdir()),
        seconds=seconds,
        resumed=resumed,
        notes=tuple(manifest["notes"]),
        **{name: data[name] for name in ("tokens", "sequences", "context")},
        **{name: manifest[name] for name in ("model", "blocks", "hessians", "gradients", "few")},
    )
