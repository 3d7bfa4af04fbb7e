"""The measurement as it is kept: `<file>.measure.json`, one flat object.

Every number that a chart or a CI job may want is a field of its own, with the ends of its 95 % interval
beside it as `<field>_low` and `<field>_high`.  Two versions travel with it: `schema_version` changes
when a field is renamed or removed, `metric_version` when a number is computed differently, so that
figures of different meaning are never compared in silence.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dither.display import interval, pairs
from dither.formats.sidecars import Sidecar
from dither.units import format_bytes

SCHEMA_VERSION = 1
METRIC_VERSION = 1
SUFFIX = ".measure.json"
_LARGEST_FILE = 64 * 2**20  # bytes; a measurement of a thousand blocks and sequences is under 1 MiB
_AGAIN = "Measure the file again with `dither measure`."


class Measurement(BaseModel):
    """What one quantized file costs against its reference; KL divergences in nats, shares from 0 to 1."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    schema_version: int = SCHEMA_VERSION
    metric_version: int = METRIC_VERSION
    tool: str  # "dither 0.1.0"

    file: str  # name without its folder
    file_sha256: str = ""  # of the bytes; empty in a copy that the file itself carries
    type: str = ""  # the preset's name where the file says so: "Q4_K_M"
    bytes: NonNegativeInt  # of all tensors, scales included
    bpw: float  # bits per weight: 8 · bytes / parameters
    reference: str
    reference_sha256: str = ""

    data: str  # a file's name, a data set's, or "self": text the reference wrote
    data_sha256: str  # of the token ids that were used
    context: PositiveInt  # longest sequence, tokens
    sequences: PositiveInt
    tokens: PositiveInt  # positions scored
    skipped: Literal["half"] | NonNegativeInt = "half"  # leading positions of each sequence not scored

    kl_mean: float
    kl_mean_low: float
    kl_mean_high: float
    kl_median: float
    kl_median_low: float
    kl_median_high: float
    kl_p90: float
    kl_p90_low: float
    kl_p90_high: float
    kl_p99: float
    kl_p99_low: float
    kl_p99_high: float
    kl_p999: float
    kl_p999_low: float
    kl_p999_high: float
    kl_max: float
    kl_max_low: float
    kl_max_high: float
    same_top: float  # share of positions where both find the same token likeliest
    same_top_low: float
    same_top_high: float
    delta_p_mean: float  # of the token that came next; below 0: the quantized model expects it less
    delta_p_mean_low: float
    delta_p_mean_high: float
    delta_p_rms: float
    delta_p_rms_low: float
    delta_p_rms_high: float
    ppl: float  # perplexity of the quantized file
    ppl_low: float
    ppl_high: float
    ppl_reference: float
    ppl_reference_low: float
    ppl_reference_high: float
    ppl_ratio: float
    ppl_ratio_low: float
    ppl_ratio_high: float

    drift: tuple[float, ...] = ()  # after each block: mean of ‖h − ĥ‖ / ‖h‖ over the scored positions
    sequence_kl: tuple[float, ...] = ()  # each sequence's mean, so that two files can be compared in pairs
    sequence_tokens: tuple[int, ...] = ()

    seconds: float = Field(default=0.0, ge=0)
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """In a notebook."""
        rows = [
            ("size", f"{format_bytes(self.bytes)}, {self.bpw:.2f} bits per weight"),
            ("KL divergence", f"{interval(self.kl_mean, self.kl_mean_low, self.kl_mean_high)} nats per token"),
            ("99 % of tokens below", f"{interval(self.kl_p99, self.kl_p99_low, self.kl_p99_high)} nats"),
            ("same top token", interval(self.same_top, self.same_top_low, self.same_top_high, ".1%")),
            ("perplexity", f"× {interval(self.ppl_ratio, self.ppl_ratio_low, self.ppl_ratio_high, '.4g')}"),
            ("measured on", f"{self.tokens} tokens of {self.data}, in sequences of {self.context}"),
        ]
        return pairs(f"{self.file}, {self.type}, against {self.reference}", rows, self.notes)


_KEPT = Sidecar(Measurement, SUFFIX, SCHEMA_VERSION, "is no measurement", _LARGEST_FILE, _AGAIN)
path_for, load, parse = _KEPT.path_for, _KEPT.load, _KEPT.parse
save, check_writable = _KEPT.save, _KEPT.check_writable
