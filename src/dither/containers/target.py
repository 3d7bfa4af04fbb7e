"""Where quantized weights go: a GGUF or a checkpoint folder, behind the few things that differ.

A target plans what every tensor becomes, names its place, and opens the output that rows are written to; what
is done to the weights in between knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dither.containers.mix import Mix, MixTensor, Options
from dither.containers.part_output import PartOutput
from dither.formats.evidence import EvidenceStore
from dither.types import Model, No, Tensor, Yes

OrderOf = Callable[[str, int], "npt.NDArray[np.intp] | None"]


@dataclass(frozen=True)
class OutputSettings:
    """What an output is told besides the weights."""

    recipe: str  # how it is made: it says so of itself
    identity: str  # by which a later run of the same work knows it
    store: EvidenceStore | None
    measured: bool = False  # whether room is kept for a measurement
    order: OrderOf | None = None  # in which order the columns of a tensor's expert will come


class Target(Protocol):
    @property
    def options(self) -> Options: ...

    def check(self, model: Model) -> None:
        """Whether those who run the file load this model from it; headers alone are read.

        Raises UnsupportedError for what they have no place for, SourceError for what they miss."""

    def check_network(self, model: Model) -> list[str]:
        """The same where it takes building the network, which takes a moment: once, before work starts.
        Notes on what could not be checked."""

    def check_written(self, part: Path) -> None:
        """The same of what was written, before it gets its name."""

    def engines(self, model: Model) -> tuple[tuple[str, ...], str]:
        """Engines that load the model from it, the first choice first, and the package that transformers wants too."""

    def mix(self, model: Model, known: Collection[str]) -> Mix:
        """`known` names the tensors that have importance."""

    def name(self, stem: str, label: str) -> str:
        """What the output is called unless somebody names it."""

    def check_place(self, path: Path, named: str, inside: bool, force: bool) -> Path:
        """The output's path, where `path` may also be a folder to put it in, and is with `inside`."""

    def open(self, path: Path, model: Model, mix: Mix, settings: OutputSettings) -> PartOutput:
        """The output that a model's rows are written to."""

    def header_bytes(
        self, model: Model, store: EvidenceStore | None, solver: str, transforms: Mapping[str, Any]
    ) -> int:
        """What a planned file takes besides its tensors, with room for its measurement; `transforms` says
        what they chose.  Of a folder: its headers and all the files beside the weights."""

    def file_bytes(self, model: Model, mix: Mix, store: EvidenceStore | None, solver: str, measured: bool) -> int:
        """Bytes of the file that a mix becomes; of a folder's files together no less, and little more."""

    def together(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Tensors in the order of `names`, grouped where those who run the file want them of one type."""

    def types(self, model: Model, asked: Sequence[str] | None) -> tuple[str, ...]:
        """What a plan may choose among, by falling bits: those asked for, or all that are sensible."""

    def can_hold(self, kind: str, shape: tuple[int, ...]) -> Yes | No: ...

    def codec_of(self, tensor: Tensor, kind: str) -> str:
        """The codec that stores this very tensor in a type, where that hangs on its weights."""

    def bytes_of(self, kind: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor's data in a type that can hold it; padding in the file comes on top."""

    def aligned(self, model: Model, size: int) -> int:
        """Bytes that a tensor takes in the file, padding included."""

    def fixed(self, model: Model) -> dict[str, MixTensor]:
        """What no plan decides about: tensor → type, bytes and why, in the file's order."""
