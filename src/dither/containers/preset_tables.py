"""The tables behind presets: llama.cpp's mixes, written as data.

Source: `tools/quantize/quantize.cpp` (names and numbers) and `src/llama-quant.cpp` (types) of llama.cpp.
`RULES` has a line per preset and kind of matrix, read left to right: the first type whose conditions
(joined by &, named in `presets.py`) hold is taken, a type without condition always; where none holds,
or no line exists, the preset's base type stays.  `*` stands for every preset without a line of its own.
"""

from __future__ import annotations

import re

# base type, number in `general.file_type`, output layer, token embedding, what a newcomer should know
PRESETS = """
F32 | F32 0 F32 F32 | No loss and no saving: every weight in 32-bit floating point.
F16 | F16 1 F16 F16 | Half precision, 16 bits a weight: as good as lossless for most models.
BF16 | BF16 32 BF16 BF16 | Half precision with the range of 32 bits: what most models are published in.
Q8_0 | Q8_0 7 Q8_0 Q8_0 | 8-bit, one scale per 32 weights: about half of F16, hard to tell from the original.
Q6_K | Q6_K 18 Q6_K Q6_K | 6-bit K-quant throughout: very close to the original at about 40 % of F16.
Q5_K_M | Q5_K 17 Q6_K Q5_K | 5-bit K-quant, medium mix: sensitive matrices in 6 bits; a careful choice.
Q5_K_S | Q5_K 16 Q6_K Q5_K | 5-bit K-quant, small mix: every matrix in 5 bits, the output layer in 6.
Q5_1 | Q5_1 9 Q6_K Q5_1 | Older 5-bit format, scale and offset per 32 weights: prefer Q5_K_M where it fits.
Q5_0 | Q5_0 8 Q6_K Q5_0 | Older 5-bit format, one scale per 32 weights: prefer Q5_K_S where it fits.
Q4_K_M | Q4_K 15 Q6_K Q4_K | 4-bit K-quant, medium mix: sensitive matrices in 6 bits; the usual choice.
Q4_K_S | Q4_K 14 Q6_K Q4_K | 4-bit K-quant, small mix: 5 bits for sensitive matrices of the first layers.
Q4_1 | Q4_1 3 Q6_K Q4_1 | Older 4-bit format, scale and offset per 32 weights: prefer Q4_K_M where it fits.
Q4_0 | Q4_0 2 Q6_K Q4_0 | Older 4-bit format, one scale per 32 weights: simple, fast on phones.
IQ4_NL | IQ4_NL 25 Q6_K IQ4_NL | 4-bit codebook, one scale per 32 weights: better than Q4_0 at its size.
IQ4_XS | IQ4_XS 30 Q6_K IQ4_XS | 4-bit codebook in blocks of 256: smaller than Q4_K_S at about its quality.
MXFP4_MOE | MXFP4 38 Q8_0 Q8_0 | 4-bit floating point for a mixture's experts, 8 bits for everything else.
Q3_K_L | Q3_K 13 Q6_K Q3_K | 3-bit K-quant, large mix: sensitive matrices in 5 bits.
Q3_K_M | Q3_K 12 Q6_K Q3_K | 3-bit K-quant, medium mix: 4 or 5 bits where it hurts most; loss starts to show.
Q3_K_S | Q3_K 11 Q6_K Q3_K | 3-bit K-quant, small mix: 3 bits everywhere but in the output layer.
IQ3_M | IQ3_S 27 Q6_K IQ3_S | 3-bit lattice, medium mix: better than Q3_K_M at its size, slower on CPUs.
IQ3_S | IQ3_S 26 Q6_K IQ3_S | 3-bit lattice, about 3.4 bits a weight: better than Q3_K_S.
IQ3_XS | IQ3_S 22 Q6_K IQ3_S | 3-bit lattice, extra small: middle layers go lower; needs an importance matrix.
IQ3_XXS | IQ3_XXS 23 Q5_K IQ3_S | 3-bit lattice, the smallest, about 3.1 bits; needs an importance matrix.
Q2_K | Q2_K 10 Q6_K Q2_K | 2-bit K-quant, 3 or 4 bits where it hurts most: clearly worse text, small memory.
Q2_K_S | Q2_K 21 Q6_K Q2_K | 2-bit K-quant, small mix: needs an importance matrix to be usable.
IQ2_M | IQ2_S 29 Q5_K IQ3_S | 2-bit lattice, medium mix, about 2.7 bits; needs an importance matrix.
IQ2_S | IQ2_XS 28 Q5_K IQ3_S | 2-bit lattice, small mix, about 2.5 bits; needs an importance matrix.
IQ2_XS | IQ2_XS 20 Q5_K Q2_K | 2-bit lattice, extra small, about 2.3 bits; needs an importance matrix.
IQ2_XXS | IQ2_XXS 19 Q5_K Q2_K | 2-bit lattice, the smallest, about 2.1 bits; needs an importance matrix.
TQ2_0 | TQ2_0 37 Q6_K Q4_K | Ternary weights in 2 bits: for models trained so (BitNet), ruinous for others.
TQ1_0 | TQ1_0 36 Q6_K Q4_K | Ternary weights in 1.7 bits: for models trained so (BitNet), ruinous for others.
IQ1_M | IQ1_M 31 Q5_K Q2_K | 1-bit lattice, medium mix, about 1.8 bits; needs an importance matrix.
IQ1_S | IQ1_S 24 Q5_K Q2_K | 1-bit lattice, about 1.6 bits: a last resort; needs an importance matrix.
"""
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

RULES = """
Q2_K                attn_v       experts8:Q8_0 gqa4:Q4_K Q3_K
Q2_K_S              attn_v       experts8:Q8_0 gqa4:Q4_K
IQ3_XXS             attn_v       experts8:Q8_0 gqa4:Q4_K no_imatrix:IQ3_S IQ3_XXS
IQ3_XS,IQ3_S        attn_v       experts8:Q8_0 gqa4:Q4_K
IQ3_M               attn_v       experts8:Q8_0 Q4_K
Q3_K_M              attn_v       experts8:Q8_0 first_two:Q5_K Q4_K
Q3_K_L              attn_v       experts8:Q8_0 Q5_K
IQ4_NL,IQ4_XS       attn_v       experts8:Q8_0 gqa4:Q5_K
Q4_K_M,Q5_K_M       attn_v       experts8:Q8_0 more_bits:Q6_K
Q4_K_S              attn_v       experts8:Q8_0 first_four:Q5_K
IQ2_S,IQ2_M         attn_v       gqa4:Q4_K experts4:Q4_K IQ3_S
IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS attn_v gqa4:Q4_K experts4:Q4_K Q2_K
*                   attn_v       experts8:Q8_0

IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS,IQ2_S,IQ2_M attn_k experts8:Q4_K
IQ3_XS              attn_k       experts8:Q8_0 IQ3_XXS
IQ3_XXS             attn_k       experts8:Q8_0 IQ2_S
*                   attn_k       experts8:Q8_0
IQ3_XS              attn_q       IQ3_XXS
IQ3_XXS             attn_q       IQ2_S

Q2_K                ffn_down     Q3_K
Q2_K_S              ffn_down     first_eighth:Q4_K
IQ3_XXS             ffn_down     no_imatrix&first_eighth:Q4_K no_imatrix:Q3_K
Q3_K_M              ffn_down     first_sixteenth:Q5_K not_falcon:Q4_K more_bits:Q4_K
IQ3_M               ffn_down     first_eighth:Q4_K experts8&more_bits:Q4_K
Q3_K_L              ffn_down     falcon:Q4_K Q5_K
Q4_K_M              ffn_down     falcon&first_sixteenth:Q6_K falcon&more_bits:Q5_K not_falcon&more_bits:Q6_K
IQ4_NL,IQ4_XS       ffn_down     no_imatrix&first_eighth:Q5_K
Q5_K_M              ffn_down     more_bits:Q6_K
Q4_K_S              ffn_down     not_falcon&first_eighth:Q5_K
Q4_0                ffn_down     imatrix&first_eighth:Q4_1
Q5_0                ffn_down     imatrix&first_eighth:Q5_1
IQ2_S,IQ2_M         ffn_down     counted_eighth:IQ3_S
IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS ffn_down counted_eighth:Q2_K

Q2_K                attn_output  falcon:Q2_K experts8:Q5_K Q3_K
IQ3_XXS             attn_output  falcon:IQ3_XXS experts8:Q5_K IQ3_S
Q3_K_M              attn_output  falcon:Q3_K experts8:Q5_K Q4_K
Q3_K_L              attn_output  falcon:Q4_K experts8:Q3_K Q5_K
IQ3_M               attn_output  falcon:IQ3_S experts8:Q5_K Q4_K
IQ3_XS,Q3_K_S,IQ4_NL,Q4_K_S,Q4_K_M,IQ3_S,IQ4_XS attn_output not_falcon&experts8:Q5_K
IQ1_S,IQ1_M         attn_output  experts8:Q5_K IQ2_XXS
IQ2_S,IQ2_M         attn_output  experts8:Q5_K IQ3_S
IQ2_XXS,IQ2_XS      attn_output  experts8:Q5_K

IQ3_XS              ffn_gate     middle:IQ3_XXS
IQ3_XS              ffn_up       middle:IQ3_XXS
"""

# The first part of a name that is found decides; fused and low-rank projections count as attn_v.
CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip

# Matrices that stay as they are, by a part of their name: small, or read in a way no quantized type allows.
KEPT = {
    "_norm.weight": "norm", "ffn_gate_inp.weight": "router", "ffn_gate_tid2eid.weight": "routing table",
    "altup": "small", "laurel": "small", "per_layer_model_proj": "small",
    "position_embd.weight": "position table", "token_types.weight": "position table",
    "ssm_conv1d": "convolution", "shortconv.conv.weight": "convolution",
    "indexer.k_proj.weight": "small", "indexer.q_proj.weight": "small", "time_mix_lerp_fused.weight": "small",
    "attn_rel_b.weight": "position table", ".position_embd": "position table", "sam.pos_embd": "vision",
    "sam.neck.": "vision", "sam.net_": "vision", ".rel_pos": "vision", ".patch_embd": "vision",
    ".patch_merger": "vision", "a.rvq.codebook": "audio", "mm.a.code_embd": "audio",
}  # fmt: skip
KEPT_RWKV = re.compile(r"time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12])\.weight")

LARGE = {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}  # what llama.cpp calls 70B, beside llama
