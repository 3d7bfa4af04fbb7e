"""Rotation: turn the residual stream so that no channel sticks out, without changing what is computed.

A few channels of a transformer's residual stream are far larger than the rest, and so are the weights that
read and write them; a block that holds such a weight has a coarse scale for all its neighbors.  The RMS norm
only looks at a vector's length, so all channels may be mixed by one orthogonal Q, if every matrix that
writes to the stream writes the turned vectors and every one that reads it turns them back:

    token embedding   E → E Q               attention and feed-forward outputs   W → Qᵀ W,  b → b Q
    readers of a norm W → W diag(g) Q       their norm's gain                    g → 1

Gains do not commute with Q, so they are absorbed into the readers first.  The same is why a norm *after* a
block's last matrix (Gemma's), whose gain meets no matrix before the residual sum, rules rotation out, and
why a mean-subtracting LayerNorm does.  The output matrix needs its norm's gain and Q, the embedding Q alone:
where the two were one tensor they must part, and the file grows by an output matrix.

Statistics turn with the inputs: H' = Qᵀ diag(1/g) H diag(1/g) Q.  Mean squares alone say nothing of H', so
without a Hessian the readers' evidence is dropped, and a note says so.

Exactness is checked on everything that is read, before it is rounded: a random vector sent through the
rewritten rows must give what it gives through the originals.

Sources: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), section 4, stage 1a; Ashkboos et al. 2024
(SliceGPT, arXiv:2401.15024), section 3, for the norms.

Legend: R rows, C columns, D the residual stream's width, E experts, H held-back inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dither.errors import DitherError, SourceError, UnsupportedError
from dither.formats.tensor_names import kind_of
from dither.transforms.orthogonal import Orthogonal
from dither.transforms.rewrite import Recent, digest, rewritten, rewritten_model, sharing_inputs
from dither.transforms.wiring import Feeds, InputGroup, by_name, groups, layer_of, strangers
from dither.types import Codec, Evidence, EvidenceSource, Floats, Model, Tensor, Transformed

_TOLERANCE = 1e-4  # of |w||x|; float32 sums stay below 1e-6, a wrong rotation errs by about one
_EMBEDDING, _OUTPUT, _OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
_AFTER_BLOCK = ("post_attention_norm", "post_ffw_norm")


class Rotate:
    """Folds a random rotation of the residual stream into a model's weights.

    `feeds` is the family's table of sources and readers; `seed` draws Q; `threads` change nothing.  Q is a
    randomized Hadamard matrix where the width allows one, else (or with `hadamard=False`) random.
    Raises UnsupportedError for models whose norms do not allow it, SourceError for a gain of zero.
    """

    name = "rotate"
    needs: frozenset[str] = frozenset()

    def __init__(self, feeds: Sequence[Feeds], *, threads: int = 1, seed: int = 0, hadamard: bool = True) -> None:
        self._feeds = feeds
        self._seed, self._hadamard = seed, hadamard

    def __call__(self, model: Model, evidence: EvidenceSource, codec_of: Callable[[str], Codec | None]) -> Transformed:
        wiring = _Wiring(model, self._feeds)
        rotation = Orthogonal(wiring.tensors[_EMBEDDING].columns, self._seed, hadamard=self._hadamard)
        gains = {norm: _gain(wiring.tensors[norm]) for norm in wiring.norms}
        turned = _Turned(rotation)
        tensors = [turned.tensor(tensor, wiring, gains) for tensor in model.tensors]
        notes = [f"rotate: the residual stream of width {rotation.width} is turned ({rotation.kind})."]
        if wiring.tied:
            # The output matrix reads behind the last norm, the embedding writes before all: now they differ.
            embedding = wiring.tensors[_EMBEDDING]
            output = turned.reader(embedding, gains[_OUTPUT_NORM])
            output = replace(output, name=_OUTPUT, stored_bytes=0)  # the source has no bytes for it
            tensors.insert(model.tensors.index(embedding) + 1, output)  # where converters put it
            size = embedding.size
            notes.append(
                f"rotate: embedding and output were one tensor and had to part: {_OUTPUT} adds "
                f"{size:,} weights, {size / model.parameters:.0%} of the model's."
            )
        turned_evidence = TurnedEvidence(evidence, wiring, rotation, gains)
        notes.extend(turned_evidence.notes())
        record = {
            "name": self.name,
            "kind": rotation.kind,
            "seed": self._seed,
            "width": rotation.width,
            "untied": wiring.tied,
            "sha256": digest(rotation(probe(rotation.width))),
        }
        return Transformed(rewritten_model(model, tuple(tensors), record), turned_evidence, record, tuple(notes))


class _Wiring:
    """Which tensors read the residual stream through which norm, and which write to it."""

    def __init__(self, model: Model, feeds: Sequence[Feeds]) -> None:
        self.model, self.tensors = model, by_name(model)
        found = groups(model, feeds)
        self.norm_of = {reader: group.source for group in found if group.kind == "norm" for reader in group.readers}
        self.writers = {reader for group in found if group.kind != "norm" for reader in group.readers}
        self.tied = _OUTPUT not in self.tensors and _EMBEDDING in self.tensors
        self._refuse(feeds, found)
        if self.tied:
            self.norm_of[_OUTPUT] = _OUTPUT_NORM
        self.norms = dict.fromkeys(self.norm_of.values())

    def _refuse(self, feeds: Sequence[Feeds], found: list[InputGroup]) -> None:
        """Whatever would make the rewritten model compute something else."""
        for name in self.tensors:
            if kind_of(name) in _AFTER_BLOCK and layer_of(name):
                raise _unsupported(name, "a gain before the residual sum scales channels that must be mixed")
            if kind_of(name).endswith("_norm") and name.endswith(".bias"):
                raise _unsupported(name, "a LayerNorm subtracts the mean over channels, which mixing moves")
        if f"{self.model.arch}.attention.layer_norm_rms_epsilon" not in self.model.metadata:
            raise _unsupported(self.model.arch, "only models with RMS norms keep their meaning when turned")
        strange = [name for names in strangers(self.model, feeds).values() for name in names]
        if strange:
            raise _unsupported(strange[0], "no table says whether it reads or writes the residual stream")
        missing = [name for name in (_EMBEDDING, _OUTPUT_NORM) if name not in self.tensors]
        unfed = [g.source for g in found if g.kind != "norm" and g.source not in self.norm_of]
        if missing or unfed or not self.writers:
            odd = [*missing, *unfed, self.model.name][0]
            raise _unsupported(odd, "the model is not wired as its architecture's table says")


def _unsupported(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(name, f"{reason}: this model cannot be rotated", "Use awq, or no transform.")


def _gain(norm: Tensor) -> Floats:
    gain_D: Floats = np.array(norm.read(0, 1), dtype=np.float32).reshape(-1)
    if np.any(gain_D == 0):
        channel = int(np.flatnonzero(gain_D == 0)[0])
        reason = f"channel {channel} has a gain of zero: its inputs' statistics before the gain are lost"
        raise SourceError(norm.name, reason, "Use awq, or no transform.")
    return gain_D


class _Turned:
    """Rewrites tensors for one rotation, and checks each row it hands out."""

    def __init__(self, rotation: Orthogonal) -> None:
        self._rotation = rotation
        self._probe_D = probe(rotation.width)
        self._turned_probe_D = rotation(self._probe_D)
        self._whole: Recent[Floats] = Recent(2)

    def tensor(self, tensor: Tensor, wiring: _Wiring, gains: Mapping[str, Floats]) -> Tensor:
        name = tensor.name
        # A gain is in its readers by now; who reads the stream turns it back, and who writes to it writes it turned.
        if name in gains:
            return rewritten(tensor, lambda start, stop: np.ones((stop - start, tensor.columns), np.float32))
        if name in wiring.norm_of:
            return self.reader(tensor, gains[wiring.norm_of[name]])
        if name == _EMBEDDING:
            return self.reader(tensor, None)
        if name in wiring.writers:
            return rewritten(tensor, self._writer(tensor))
        if name.removesuffix("bias") + "weight" in wiring.writers:
            return rewritten(tensor, lambda start, stop: self._rotation(tensor.read(start, stop)))
        return tensor

    def reader(self, tensor: Tensor, gain_D: Floats | None) -> Tensor:
        """Rows turned one by one: w → (w · g) Q."""

        def read(start: int, stop: int) -> Floats:
            w_RD = tensor.read(start, stop)
            # w · (g x) = (w g) · x = (w g) Q · x Q: the gain first, as it does not commute with Q.
            scaled_RD = w_RD if gain_D is None else w_RD * gain_D
            turned_RD: Floats = self._rotation(np.ascontiguousarray(scaled_RD, dtype=np.float32))
            lengths_R = np.linalg.norm(scaled_RD, axis=1) * np.linalg.norm(self._probe_D)
            check(tensor.name, turned_RD @ self._turned_probe_D, scaled_RD @ self._probe_D, lengths_R)
            return turned_RD

        return rewritten(tensor, read)

    def _writer(self, tensor: Tensor) -> Callable[[int, int], Floats]:
        """Columns turned: every row needs all rows of its expert, so one expert's matrix is kept."""
        rows = self._rotation.width

        def whole(expert: int) -> Floats:
            w_DC = tensor.read(expert * rows, (expert + 1) * rows)
            turned_DC: Floats = np.ascontiguousarray(self._rotation(np.ascontiguousarray(w_DC.T)).T)
            x_C = probe(tensor.columns)
            y_D = w_DC @ x_C
            length = float(np.linalg.norm(w_DC) * np.linalg.norm(x_C))
            check(tensor.name, turned_DC @ x_C, self._rotation(y_D), np.full(rows, length))
            return turned_DC

        def read(start: int, stop: int) -> Floats:
            pieces = []
            while start < stop:
                expert, first = divmod(start, rows)
                last = min(first + stop - start, rows)
                turned_DC = self._whole.get((tensor.name, expert), partial(whole, expert))
                pieces.append(turned_DC[first:last])
                start += last - first
            return np.array(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)

        return read


def probe(size: int) -> Floats:
    """A random vector to send through a matrix; always the same one."""
    return np.random.default_rng(size).standard_normal(size).astype(np.float32)


def check(name: str, found_R: Floats, expected_R: npt.NDArray[Any], lengths_R: npt.NDArray[Any]) -> None:
    """Raises DitherError where a rewritten row computes something else than the original."""
    wrong_R = np.abs(found_R - expected_R) > _TOLERANCE * lengths_R  # never true of NaN: the reader tells of those
    if np.any(wrong_R):
        raise DitherError(
            name,
            f"row {int(np.flatnonzero(wrong_R)[0])} of a chunk computes something else once rotated",
            "Please report this; quantize without rotate meanwhile.",
        )


class TurnedEvidence:
    """What calibration would have seen of the turned residual stream."""

    def __init__(
        self, base: EvidenceSource, wiring: _Wiring, rotation: Orthogonal, gains: Mapping[str, Floats]
    ) -> None:
        self._base, self._wiring, self._rotation, self._gains = base, wiring, rotation, gains
        self._recent: Recent[tuple[Evidence | None, Evidence]] = Recent(2)

    def __call__(self, tensor: str, expert: int = 0) -> Evidence | None:
        if tensor == _EMBEDDING:
            return None if self._wiring.tied else self._base(tensor, expert)  # only looked up from now on
        seen = self._origin(tensor, expert)
        norm = self._wiring.norm_of.get(tensor)
        if seen is not None and seen.output_KOO is not None and tensor in self._wiring.writers:
            return replace(seen, output_KOO=turned_output(seen.output_KOO, self._rotation))
        if seen is None or norm is None:
            return seen
        key = (id(seen.mean_square_C), norm)
        found = self._recent.get(key, lambda: (turn(seen, self._gains[norm], self._rotation), seen))[0]
        return None if found is None else sharing_inputs(found, seen.output_KOO)

    def _origin(self, tensor: str, expert: int) -> Evidence | None:
        found = self._base(tensor, expert)
        if found is None and tensor == _OUTPUT and self._wiring.tied:
            return self._base(_EMBEDDING, expert)
        return found

    def notes(self) -> list[str]:
        """Which evidence is lost."""
        lost = [
            name
            for name in self._wiring.norm_of
            if (seen := self._origin(name, 0)) is not None and seen.hessian_CC is None
        ]
        if not lost:
            return []
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return [
            f"rotate: {lost[0]}{more} are rounded without evidence: mean squares alone do not say what the "
            "turned inputs are like; calibrate with Hessians."
        ]


def turned_output(output_KOO: Floats, rotation: Orthogonal) -> Floats:
    """The diagonal blocks of Qᵀ G Q: what a loss pulls at where a layer puts out y Q."""
    blocks, rows = output_KOO.shape[:2]
    shape, each = (blocks, rows, blocks, rows), np.arange(blocks)
    whole_RR = np.zeros((blocks * rows, blocks * rows), np.float32)
    whole_RR.reshape(shape)[each, :, each] = output_KOO
    whole_RR = rotation(np.ascontiguousarray(rotation(whole_RR).T))
    cut_KOO = whole_RR.reshape(shape)[each, :, each]
    return np.asarray((cut_KOO + cut_KOO.swapaxes(1, 2)) / 2, np.float32)


def turn(seen: Evidence, gain_D: Floats, rotation: Orthogonal) -> Evidence | None:
    """The evidence of (x / g) Q, for x of width D; None where only mean squares are known."""
    if seen.hessian_CC is None:
        return None
    # What calibration saw is g ∘ x; readers now meet x Q, with the gain in their own columns.
    inverse_D = 1 / gain_D.astype(np.float64)
    hessian_DD = seen.hessian_CC * inverse_D * inverse_D[:, None]
    hessian_DD = rotation(np.ascontiguousarray(rotation(hessian_DD).T))
    hessian_DD = (hessian_DD + hessian_DD.T) / 2
    held_HD = None
    if seen.held_HC is not None:
        held_HD = rotation(seen.held_HC * inverse_D).astype(np.float32)
    diagonal_D = np.maximum(np.diag(hessian_DD), 0).astype(np.float32)
    return replace(seen, mean_square_C=diagonal_D, hessian_CC=hessian_DD.astype(np.float32), held_HC=held_HD)


TRANSFORM = Rotate
