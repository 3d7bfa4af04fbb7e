"""Calibrate: run text through a model and keep what each linear layer's input looked like.

One decoder block is in memory at a time.  All sequences go through block 0, batch by batch, while a
`Collector` adds up what its layers see; its statistics are written, the block is dropped, and the hidden
states that left it enter block 1; at the end the output matrix's own input is seen.  A finished block's
statistics and the states after it are on disk before the next begins to count as done, so that a run
killed at any moment continues and ends with the same bytes.

Legend: S sequences, T token positions, H hidden width, B sequences of a batch, E experts, C columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dither import __version__
from dither.engines.vocabulary import vocabulary_fingerprint
from dither.formats.evidence import (
    IMATRIX,
    TOKENS,
    EvidenceStore,
    model_identity,
    weights_sample,
    write_arrays,
    write_groups,
    write_manifest,
)
from dither.formats.imatrix import write_imatrix
from dither.measuring.folder import Folder
from dither.measuring.hidden import Hidden
from dither.measuring.text import SELF, Sequences, batches, checked_context, sequences, tokens_sha256
from dither.models.blocks import open_blocks
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.types import Model, Tensor

if TYPE_CHECKING:
    from dither.measuring.collect import Collector
    from dither.models.blocks import Blocks

DEFAULT_TOKENS = 2**15
BATCH_TOKENS = 4096
_SHOWN_EXPERTS = 8
_OUTPUT = "output.npz"


@dataclass(frozen=True)
class Calibration:
    """What was learnt, and where it is.

    `few` names, for each layer with experts, those that saw fewer than 256 tokens; `seconds` is the
    whole run but for what an interrupted one had done.
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
    seconds: float
    resumed: int  # blocks that an interrupted run had finished
    few: dict[str, list[int]]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes)}


def calibrate(
    model: str | Path | Model,
    data: str | Path = SELF,
    *,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    hessians: bool = True,
    out: str | Path = "evidence",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    batch: int = BATCH_TOKENS,
    force: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Runs `tokens` tokens of `data` through `model` and writes the evidence folder `out`.

    `data` is a text file, a file of JSON lines, `hf:DATASET[:SPLIT[:COLUMN]]`, or `self`: text that the
    model writes with `seed`.  `context` is tokens per sequence (512, or the model's), `batch` tokens
    that go through a block at once, `threads` for torch and llama.cpp.  Without `hessians` only mean
    squares are kept: what llama.cpp's importance matrix holds.

    Raises UsageError (the request), SourceError (model or text), UnsupportedError (the architecture),
    OutputError (the folder, the disk): before any work wherever that can be known.
    """
    started = time.monotonic()
    report = progress or Silent()
    opened = model if isinstance(model, Model) else open_model(model)
    context = checked_context(opened, tokens, context)
    blocks = open_blocks(opened, device=device)
    request = {
        "model": opened.fingerprint, "data": str(data), "tokens": tokens, "context": context, "seed": seed,
        "hessians": hessians, "batch": batch, "device": device, "version": __version__,
    }  # fmt: skip
    with Folder(Path(out).expanduser(), force=force) as folder, _threads(threads):
        continued = folder.continues(request)
        if folder.discarded:
            report.note("An unfinished calibration with other settings was discarded.")
        text = _text(folder, opened, data, tokens, context, seed, threads, report)
        run = _Run(opened, blocks, text, folder, hessians, batch, report)
        for note in run.notes:
            report.note(note)
        resumed = run.blocks() if continued else run.blocks(afresh=True)
        manifest = run.manifest()
        _write_importance(folder.path, manifest, text)
        write_manifest(folder.path, manifest)
        run.hidden.remove()
        folder.tidy()
    return _summary(folder.path, manifest, time.monotonic() - started, resumed)


def _text(
    folder: Folder, model: Model, data: str | Path, tokens: int, context: int, seed: int,
    threads: int | None, report: Progress,
) -> Sequences:  # fmt: skip
    """The sequences to run: an interrupted run's own where it wrote them, for writing costs minutes."""
    kept = folder.state.get("text")
    if kept is not None and str(data) == SELF:
        found = _kept_text(folder.path, kept)
        if found is not None:
            return found
    text = sequences(
        model, data, tokens=tokens, context=context, seed=seed, scratch=folder.path, threads=threads,
        progress=report,
    )  # fmt: skip
    if kept is not None and kept["sha256"] != text.sha256:
        report.note("The text has changed since the unfinished calibration began: it starts over.")
        folder.state.update(files={}, few={})
    write_arrays(folder.path / TOKENS, {"tokens_ST": text.tokens_ST, "lengths_S": text.lengths_S})
    folder.state["text"] = {"name": text.name, "sha256": text.sha256, "seed": seed, "notes": list(text.notes)}
    folder.save()
    return text


def _kept_text(folder: Path, kept: Mapping[str, Any]) -> Sequences | None:
    from dither.formats.arrays import read_members

    if not (folder / TOKENS).is_file():
        return None
    members = read_members(folder / TOKENS)
    tokens_ST, lengths_S = members["tokens_ST"].read(), members["lengths_S"].read()
    if tokens_sha256(tokens_ST, lengths_S) != kept["sha256"]:
        return None
    return Sequences(tokens_ST, lengths_S, kept["name"], kept["sha256"], kept["seed"], tuple(kept["notes"]))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One walk through the network."""

    def __init__(
        self, model: Model, blocks: Blocks, text: Sequences, folder: Folder, hessians: bool, batch: int,
        report: Progress,
    ) -> None:  # fmt: skip
        self.model, self.network, self.text, self.folder = model, blocks, text, folder
        self.hessians, self.report = hessians, report
        sequences, context = text.tokens_ST.shape
        self.hidden = Hidden(folder.path, (sequences, context, blocks.width))
        self.batches = list(batches(text.lengths_S, batch))
        self.experts = {t.name: t.shape[0] if len(t.shape) > 2 else 1 for t in model.tensors}
        self.notes = [*model.notes, *blocks.notes, *text.notes]
        if hessians and not self._collector().held_S.any():
            self.notes.append(
                f"{sequences} sequences are too few to hold any back: nothing will judge a solution."
            )
        folder.need(statistics_bytes(model, hessians) + self.hidden.disk_bytes)

    def blocks(self, afresh: bool = False) -> int:
        """Runs what is not done; how many blocks were."""
        state = self.folder.state
        done = 0 if afresh else self.hidden.resume(self._finished())
        if done:
            self.report.note(f"Resuming: {done} of {self.network.count} blocks were already done.")
        weights = [_weights(self.model, f"blk.{index}.") for index in range(self.network.count)]
        output = _weights(self.model, "output.") or _weights(self.model, "token_embd.")
        self.report.start(sum(weights) + output, sum(weights[:done]))
        if not done:
            self._embed()
        for index in range(done, self.network.count):
            name = f"blk.{index}.npz"
            state["files"][name], few = self._block(index, weights[index])
            state["few"].update(few)
            self.folder.save()
            self.hidden.finished(index + 1)
        state["files"][_OUTPUT] = self._output(output)
        return done

    def _finished(self) -> int:
        """Blocks of which the statistics are on disk, counted from the first."""
        files = self.folder.state["files"]
        for index in range(self.network.count):
            name = f"blk.{index}.npz"
            if name not in files or not (self.folder.path / name).is_file():
                return index
        return self.network.count

    def _embed(self) -> None:
        import torch

        for index_B in self.batches:
            tokens_BT = torch.from_numpy(self.text.tokens_ST[index_B].astype(np.int64))
            self.hidden.write(index_B, self.network.embed(tokens_BT).float().cpu().numpy())
        self.hidden.finished(0)

    def _collector(self) -> Collector:
        from dither.measuring.collect import Collector

        sequences, context = self.text.tokens_ST.shape
        return Collector(self.experts, sequences=sequences, context=context, hessians=self.hessians)

    def _block(self, index: int, weights: int) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
        block, collector = self.network.load(index), self._collector()
        for index_B, hidden_BTH in self._through(collector):
            left_BTH = block.watch(hidden_BTH, collector.see)
            self.hidden.write(index_B, left_BTH.float().cpu().numpy())
            self.report.advance(self._share(index_B, weights), f"block {index + 1} of {self.network.count}")
        groups, few = collector.finish()
        return write_groups(self.folder.path / f"blk.{index}.npz", groups), few

    def _output(self, weights: int) -> list[dict[str, Any]]:
        head, collector = self.network.head(), self._collector()
        for index_B, hidden_BTH in self._through(collector):
            head.watch(hidden_BTH, collector.see)
            self.report.advance(self._share(index_B, weights), "the output matrix")
        return write_groups(self.folder.path / _OUTPUT, collector.finish()[0])

    def _through(self, collector: Collector) -> Iterator[tuple[Any, Any]]:
        import torch

        device, dtype = self.network.device, self.network.dtype
        for index_B in self.batches:
            collector.batch(index_B, self.text.lengths_S[index_B], device)
            # A copy in torch's own memory, which is aligned: where numpy's begins is luck, and matrix
            # products round by it.
            yield index_B, torch.tensor(self.hidden.read(index_B)).to(device, dtype)

    def _share(self, index_B: Any, weights: int) -> int:
        return weights * len(index_B) // len(self.text.lengths_S)

    def manifest(self) -> dict[str, Any]:
        """Nothing in it depends on when or how often the run was interrupted."""
        state, text = self.folder.state, self.text
        few = _few_note(state["few"])
        return {
            "dither": __version__,
            "model": self.model.name,
            "arch": self.model.arch,
            "model_identity": model_identity(self.model),
            "weights_sample": weights_sample(self.model),
            "vocabulary": vocabulary_fingerprint(self.model),
            "data": {
                "name": text.name,
                "sha256": text.sha256,
                "seed": text.seed,
                "tokens": text.tokens,
                "sequences": len(text.lengths_S),
                "context": int(text.tokens_ST.shape[1]),
                "held_back": int(self._collector().held_S.sum()),
            },
            "hessians": self.hessians,
            "blocks": self.network.count,
            "files": state["files"],
            "few": state["few"],
            "notes": [*self.notes, *([few] if few else [])],
        }


def _weights(model: Model, prefix: str) -> int:
    return sum(tensor.size for tensor in model.tensors if tensor.name.startswith(prefix))


def _few_note(few: Mapping[str, list[int]]) -> str:
    """One line for all experts that saw next to nothing."""
    from dither.measuring.collect import FEW

    layers = {".".join(name.split(".")[:2]): experts for name, experts in few.items()}
    named = [f"{layer} expert {expert}" for layer, experts in layers.items() for expert in experts]
    if not named:
        return ""
    shown = ", ".join(named[:_SHOWN_EXPERTS]) + (" …" if len(named) > _SHOWN_EXPERTS else "")
    return f"{len(named)} experts saw fewer than {FEW} tokens, filled up from their layer's pool: {shown}."


def statistics_bytes(model: Model, hessians: bool) -> int:
    """About what the statistics will take on disk: layers that share an input are counted once."""
    inputs = {_input_of(tensor): tensor for tensor in model.tensors if _is_linear(tensor)}
    total = 0
    for tensor in inputs.values():
        experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
        rows = tensor.columns + 1024 if hessians else 0
        total += 4 * experts * tensor.columns * (1 + rows)
    return 2 * total if not hessians else total  # the importance matrix is counted by the first


def _is_linear(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and (tensor.name.startswith("blk.") or tensor.name == "output.weight")


def _input_of(tensor: Tensor) -> str:
    name = tensor.name
    for part in ("attn_k.", "attn_v."):
        name = name.replace(part, "attn_q.")
    return name.replace("ffn_up", "ffn_gate").replace("ffn_gate_inp", "ffn_gate")


def _write_importance(folder: Path, manifest: Mapping[str, Any], text: Sequences) -> None:
    """The mean squares once more, for llama.cpp.  An expert without tokens counts as one: its values
    came from the pool, and with a count of zero they would be ignored."""
    from dither.formats.arrays import read_members

    means: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for file, groups in manifest["files"].items():
        members = read_members(folder / file)
        for i, group in enumerate(groups):
            mean_EC, counts_E = members[f"{i}.mean_square"].read(), members[f"{i}.counts"].read()
            for tensor in group["tensors"]:
                means[tensor], counts[tensor] = mean_EC, np.maximum(counts_E, 1)
    write_imatrix(
        folder / IMATRIX, means, counts, datasets=[text.name], chunks=len(text.lengths_S),
        context=int(text.tokens_ST.shape[1]),
    )  # fmt: skip


def _summary(folder: Path, manifest: Mapping[str, Any], seconds: float, resumed: int) -> Calibration:
    data, store = manifest["data"], EvidenceStore.open(folder)
    return Calibration(
        path=str(folder), model=manifest["model"], data=data["name"], tokens=data["tokens"],
        sequences=data["sequences"], context=data["context"], blocks=manifest["blocks"],
        tensors=len(store.tensors), bytes=sum(entry.stat().st_size for entry in folder.iterdir()),
        hessians=manifest["hessians"], seconds=seconds, resumed=resumed, few=dict(manifest["few"]),
        notes=tuple(manifest["notes"]),
    )  # fmt: skip
