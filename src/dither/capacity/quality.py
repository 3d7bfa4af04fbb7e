"""What each type loses, from the literature: for comparing types, not for promising a number.

Source: llama.cpp, `tools/perplexity/README.md`, "LLaMA 3 8b Scoreboard" (revision f364eb6f): mean KL
divergence from the FP16 model over the Wikitext-2 test set, in nats per token.  Where the table has the
type with and without an importance matrix, the one without is taken; where it has it only with one
(10 million tokens of Wikitext), that.

They are Llama 3 8B's.  A smaller model loses more at the same type, a larger one less.  They describe a
type's usual mix: where rows do not fit and other types step in, they describe nothing, and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "llama.cpp, tools/perplexity/README.md, LLaMA 3 8B scoreboard (Wikitext-2, against FP16)"
WITH_IMPORTANCE = frozenset(
    {"IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS",
     "IQ2_XXS", "IQ1_M", "IQ1_S"}
)  # fmt: skip
KL = {
    "F16": 0.000551, "Q8_0": 0.001355, "Q6_K": 0.005452, "Q5_K_M": 0.010762, "Q5_K_S": 0.016595,
    "Q5_1": 0.018045, "Q5_0": 0.022239, "Q4_K_M": 0.031273, "Q4_K_S": 0.043136, "IQ4_NL": 0.035742,
    "IQ4_XS": 0.036334, "Q4_1": 0.071683, "Q4_0": 0.071940, "Q3_K_L": 0.087176, "Q3_K_M": 0.101913,
    "IQ3_M": 0.102534, "IQ3_S": 0.111278, "IQ3_XS": 0.138693, "IQ3_XXS": 0.183625, "Q3_K_S": 0.228217,
    "IQ2_M": 0.325989, "Q2_K_S": 0.403360, "IQ2_S": 0.439197, "Q2_K": 0.445132, "IQ2_XS": 0.546290,
    "IQ2_XXS": 0.812022, "IQ1_M": 1.393084, "IQ1_S": 2.254554,
}  # fmt: skip
MOST_FALLBACK = 0.05  # share of the weights that may be in another type than the mix asks for


@dataclass(frozen=True)
class Quality:
    """Mean KL divergence in nats per token, where it is from ("measured", "literature"), and of what."""

    kl: float
    tag: str
    source: str


def literature(to: str, fallback_share: float = 0.0) -> Quality | None:
    """The published loss of a type, None where there is none or where the file would not be that type."""
    if to not in KL or fallback_share > MOST_FALLBACK:
        return None
    return Quality(KL[to], "literature", SOURCE + (", with importance" if to in WITH_IMPORTANCE else ""))
