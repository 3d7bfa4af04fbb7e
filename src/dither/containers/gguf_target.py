"""A GGUF as the target of a run (see `target.Target`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.codecs import all_codecs, codec
from dither.containers.gguf import GGUFOutput, can_hold, reserved, reserved_numbers
from dither.containers.journal import remove_left_over
from dither.containers.mix import Mix, MixTensor, Options, make_mix
from dither.containers.part_output import PartOutput
from dither.containers.provenance import ERRORS, MEASUREMENT, output_metadata, recipe_json
from dither.containers.target import OutputSettings
from dither.errors import OutputError, UsageError
from dither.formats.evidence import EvidenceStore
from dither.formats.ggml import GGML_TYPES
from dither.formats.gguf import alignment_of, lay_out, padded
from dither.models.arch import families
from dither.models.arch.graph import check_graph
from dither.models.gguf_source import open_gguf
from dither.types import Model, No, Tensor, Yes

UNASKED = ("F32", "TQ1_0", "TQ2_0")  # never chosen unless named
_ANY_PRESET = Options("Q4_K_M")  # presets differ in types, not in what they leave alone
MEASUREMENT_ROOM = 8192  # bytes of metadata kept free for what is measured afterwards


@dataclass(frozen=True)
class GGUFTarget:
    options: Options

    def check(self, model: Model) -> None:
        check_graph(model, families())

    def check_network(self, model: Model) -> list[str]:
        return []  # `check` knows it already

    def check_written(self, part: Path) -> None:
        self.check(open_gguf(part))

    def engines(self, model: Model) -> tuple[tuple[str, ...], str]:
        return ("llama.cpp",), ""

    def mix(self, model: Model, known: Collection[str]) -> Mix:
        return make_mix(model, self.options, known)

    def name(self, stem: str, label: str) -> str:
        return f"{stem}-{label}.gguf"

    def check_place(self, path: Path, named: str, inside: bool, force: bool) -> Path:
        if path.is_dir() or inside:
            path = path / named
        if path.exists() and not force:
            remove_left_over(path)
            raise OutputError(str(path), "exists already", "Choose another name with -o, or pass --force.")
        return path

    def header_bytes(
        self, model: Model, store: EvidenceStore | None, solver: str, transforms: Mapping[str, Any]
    ) -> int:
        """Types take as many bytes in a header whichever they are: those of any preset tell."""
        options = Options(_ANY_PRESET.to, plan="0" * 64)
        mix = make_mix(model, options, store.tensors if store else ())
        recipe = recipe_json(model, options, mix, store, solver, transforms)
        metadata = self._metadata(model, mix, recipe, store, True)
        return len(lay_out(metadata, [(t.name, t.shape, t.type) for t in mix.tensors]).header)

    def file_bytes(self, model: Model, mix: Mix, store: EvidenceStore | None, solver: str, measured: bool) -> int:
        recipe = recipe_json(model, self.options, mix, store, solver)
        metadata = self._metadata(model, mix, recipe, store, measured)
        return lay_out(metadata, [(t.name, t.shape, t.type) for t in mix.tensors]).total

    def together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """llama.cpp multiplies by one tensor at a time, whatever its neighbors are."""
        return [(name,) for name in names]

    def open(self, path: Path, model: Model, mix: Mix, settings: OutputSettings) -> PartOutput:
        metadata = self._metadata(model, mix, settings.recipe, settings.store, settings.measured)
        return GGUFOutput(path, metadata, [(t.name, t.shape, t.type) for t in mix.tensors], settings.identity)

    def types(self, model: Model, asked: Sequence[str] | None) -> tuple[str, ...]:
        if asked is None:
            return tuple(name for name in all_codecs() if name in GGML_TYPES and name not in UNASKED)
        named = {codec(name.strip()).name for name in asked}
        unknown = sorted(name for name in named if name not in GGML_TYPES)
        if unknown:
            reason = f"is none of GGUF's, for which this plan is made; those are {', '.join(all_codecs())}"
            raise UsageError(f"type {unknown[0]}", reason, "Choose among them, or name a GPU format.")
        return tuple(name for name in all_codecs() if name in named)

    def can_hold(self, kind: str, shape: tuple[int, ...]) -> Yes | No:
        return can_hold(kind, shape)

    def codec_of(self, tensor: Tensor, kind: str) -> str:
        return kind

    def bytes_of(self, kind: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) * GGML_TYPES[kind].row_bytes(shape[-1])

    def aligned(self, model: Model, size: int) -> int:
        return padded(size, alignment_of(model.metadata))

    def fixed(self, model: Model) -> dict[str, MixTensor]:
        mix = make_mix(model, _ANY_PRESET)
        # A reason without a fallback says why a tensor is left alone: 1-D, a bias, a router.
        return {t.name: t for t in mix.tensors if t.reason and not t.is_fallback}

    @staticmethod
    def _metadata(model: Model, mix: Mix, recipe: str, store: EvidenceStore | None, measured: bool) -> dict[str, Any]:
        metadata = output_metadata(model, mix, recipe, store)
        metadata[ERRORS] = reserved_numbers(len(mix.tensors))
        if measured:
            metadata[MEASUREMENT] = reserved(MEASUREMENT_ROOM)
        return metadata


ANY_GGUF = GGUFTarget(Options("F16"))  # for what does not depend on the type
