"""The measurement as it is kept: `<file>.measure.json`, one flat object.

Every number that a chart or a CI job may want is a field of its own, the ends of its 95 % interval beside it
as `<field>_low` and `<field>_high` (`formats.intervals`).  Two versions travel with it: `schema_version` changes
when a field is renamed or removed, `metric_version` when a number is computed differently, so that
figures of different meaning are never compared in silence.

One scored sequence has no interval: the ends are null.  Below 4,096 scored tokens the measurement calls itself thin:
its interval is of the few sequences that were drawn, and the next text may say something else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, computed_field, model_validator

from dither.display import pairs
from dither.formats.intervals import Interval, IntervalRecord
from dither.formats.sidecars import Sidecar
from dither.units import format_bytes, format_count

SCHEMA_VERSION = 2
METRIC_VERSION = 1
THIN_TOKENS = 4096  # scored; below, a measurement is called thin
THIN_WORDS = f"a thin proof: below {THIN_TOKENS:,} tokens"
SUFFIX = ".measure.json"
_LARGEST_FILE = 64 * 2**20  # bytes; a measurement of a thousand blocks and sequences is under 1 MiB
_AGAIN = "Measure the file again with `dither measure`."


class Measurement(IntervalRecord):
    """What one quantized file costs against its reference; KL divergences in nats, shares from 0 to 1."""

    schema_version: int = SCHEMA_VERSION
    metric_version: int = METRIC_VERSION
    tool: str  # "dither 0.1.0"

    file: str  # name without its folder
    file_sha256: str = ""  # of the bytes; empty in a copy that the file itself carries
    type: str = ""  # the preset's name where the file says so: "Q4_K_M"
    bytes: NonNegativeInt  # of the file, or of a folder's weights, configuration and tokenizer together
    tensor_bytes: NonNegativeInt  # of all tensors, scales included
    bpw: float  # bits per weight: 8 · tensor_bytes / parameters
    reference: str
    reference_sha256: str = ""

    data: str  # a file's name, a data set's, or "self": text the reference wrote
    data_sha256: str  # of the token ids that were used
    context: PositiveInt  # longest sequence, tokens
    sequences: PositiveInt
    tokens: PositiveInt  # positions scored
    skipped: Literal["half"] | NonNegativeInt = "half"  # leading positions of each sequence not scored

    kl_mean: Interval
    kl_median: Interval
    kl_p90: Interval
    kl_p99: Interval
    kl_p999: Interval
    kl_max: Interval
    same_top: Interval  # share of positions where both find the same token likeliest
    delta_p_mean: Interval  # of the token that came next; below 0: the quantized model expects it less
    delta_p_rms: Interval
    ppl: Interval  # perplexity of the quantized file
    ppl_reference: Interval
    ppl_ratio: Interval

    drift: tuple[float, ...] = ()  # after each block: mean of ‖h − ĥ‖ / ‖h‖ over the scored positions
    sequence_kl: tuple[float, ...] = ()  # each sequence's mean, so that two files can be compared in pairs
    sequence_tokens: tuple[int, ...] = ()

    proof: Literal["", "renewed", "kept"] = ""  # what became of the measurement that the file itself carries
    seconds: float = Field(default=0.0, ge=0)
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, document: Any) -> Any:
        """What the first version called `bytes` were the tensors': the file's are not known, and little more."""
        if isinstance(document, dict) and document.get("schema_version", 1) == 1 and "tensor_bytes" not in document:
            return {**document, "schema_version": SCHEMA_VERSION, "tensor_bytes": document.get("bytes")}
        return document

    @computed_field  # type: ignore[prop-decorator]
    @property
    def thin(self) -> bool:
        """Whether too few tokens were scored to rely on it."""
        return self.tokens < THIN_TOKENS

    @property
    def text(self) -> str:
        """What it was measured on, in words, and whether that is little."""
        return f"{format_count(self.tokens)} tokens of {self.data}" + (f" ({THIN_WORDS})" if self.thin else "")

    @model_validator(mode="before")
    @classmethod
    def _no_interval_of_one(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Measurements of earlier versions give one sequence's figure thrice."""
        if given.get("sequences") != 1:
            return given
        return given | {f"{name}_{end}": None for name in cls._intervals for end in ("low", "high")}

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows = [
            ("size", f"{format_bytes(self.bytes)}, {self.bpw:.2f} bits per weight"),
            ("KL divergence", f"{self.kl_mean.with_ends()} nats per token"),
            ("99 % of tokens below", f"{self.kl_p99.with_ends()} nats"),
            ("same top token", self.same_top.with_ends(".1%")),
            ("perplexity", f"× {self.ppl_ratio.with_ends('.4g')}"),
            ("measured on", f"{self.text}, in sequences of {self.context}"),
        ]
        return pairs(f"{self.file}, {self.type}, against {self.reference}", rows, self.notes)


_KEPT = Sidecar(Measurement, SUFFIX, SCHEMA_VERSION, "is no measurement", _LARGEST_FILE, _AGAIN)
path_for, load, parse = _KEPT.path_for, _KEPT.load, _KEPT.parse
save, check_writable = _KEPT.save, _KEPT.check_writable
