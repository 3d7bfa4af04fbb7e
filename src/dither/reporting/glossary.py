"""The words of the field, each in one paragraph that a newcomer understands, and the view that shows it.

The page links the first use of a term in its explanations to its paragraph; `aliases` are other spellings
that are linked too.  `view` is the id of a section of the page.
"""

from __future__ import annotations

import re
from typing import Any

VIEWS = ("which", "fits", "inside", "pictures", "palette", "answers", "speed", "guide", "work")

# term, other spellings, view, paragraph
_TERMS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "quantization",
        ("quantize", "quantized", "quantizing"),
        "pictures",
        "Storing each number of a model with fewer bits. A weight like 0.0317 becomes the nearest of a few "
        "allowed values, as a photograph with millions of colors becomes one with sixteen. Well done, the "
        "picture is hardly different and the file a quarter of the size.",
    ),
    (
        "weight",
        ("weights", "parameter", "parameters"),
        "palette",
        "One of the numbers a model learnt in training; a 7 B model has seven billion. All that a model knows "
        "is in them. Quantization changes how precisely they are written down, never how many there are.",
    ),
    (
        "tensor",
        ("tensors",),
        "inside",
        "A table of weights with a name, such as blk.0.ffn_down. A model is a few hundred of them, a handful "
        "in each layer. Some bear coarse rounding well and some do not, which is why a file mixes types.",
    ),
    (
        "layer",
        ("layers",),
        "inside",
        "One storey of the model: every token passes all of them from bottom to top, and each changes it a "
        "little. Errors made in the first layers travel through all the others.",
    ),
    (
        "bits per weight",
        ("bpw", "bits-per-weight"),
        "which",
        "The size of a file, in bits, divided by the number of weights: the honest measure of how small it is. "
        'A "4-bit" file has 4.5 to 5, because scales are stored too and some tensors are kept finer.',
    ),
    (
        "block",
        ("blocks",),
        "palette",
        "Neighboring weights, 32 or 256 of them, that share a scale. Small blocks follow the weights more "
        "closely but store more scales; one very large weight makes the steps coarse for its whole block.",
    ),
    (
        "scale",
        ("scales",),
        "palette",
        'The size of the steps in a block. A 4-bit code only says "step number 5"; times the scale, it is a '
        "weight again. Like the scale of a map: the same centimeter is a kilometer on one and ten on another.",
    ),
    (
        "zero point",
        ("zero-point", "zero points"),
        "palette",
        "An offset stored beside the scale, for blocks whose weights do not lie evenly around zero. Without it "
        "half of the steps may go unused.",
    ),
    (
        "group size",
        ("group",),
        "palette",
        "How many weights share a scale in GPU formats: 128 as a rule. It is what GGUF calls the block. Groups "
        "of 32 are more exact and cost half a bit per weight, groups of 128 an eighth of a bit.",
    ),
    (
        "outlier",
        ("outliers", "outlier column"),
        "pictures",
        "A weight or an input far larger than its neighbors. The scale must reach it, so the steps become "
        "coarse for all the others in its block: one bright lamp in a photograph, and the rest goes dark. A "
        "few columns have most of them, and they matter most.",
    ),
    (
        "GGUF",
        (),
        "guide",
        "The file format of llama.cpp: one file with the weights, the vocabulary and all settings. It runs on "
        "ordinary processors, on Macs, on GPUs, and on both together when the model is too large for one.",
    ),
    (
        "K-quant",
        ("K-quants", "Q4_K_M", "Q4_K", "Q5_K_M", "Q6_K"),
        "which",
        "llama.cpp's everyday types, Q2_K to Q6_K: blocks of 256 with small blocks inside, whose scales are "
        "themselves quantized. The letter at the end (S, M, L) says how many tensors get a finer type. Q4_K_M "
        "is where most people begin.",
    ),
    (
        "I-quant",
        ("I-quants", "IQ4_XS", "IQ4_NL"),
        "palette",
        "llama.cpp's types whose steps are not evenly spaced (IQ4), or that pick whole patterns of weights "
        "from a list (IQ3 and below). Better than K-quants at the same size, slower on some processors; the "
        "small ones need an importance matrix.",
    ),
    (
        "importance matrix",
        ("imatrix",),
        "pictures",
        "For each column of a tensor, how strongly text sends numbers through it, learnt by watching the model "
        "read. Rounding then takes more care where it matters. It costs nothing in the file: it only changes "
        "which way weights are rounded.",
    ),
    (
        "calibration",
        ("calibrate", "calibrated"),
        "guide",
        "Letting the original model read some text and noting what happens inside, before quantizing. The text "
        "need not be special, only like what the model will see; Dither lets the model write its own where "
        "there is none.",
    ),
    (
        "evidence",
        (),
        "guide",
        "What calibration learnt, as a folder: for every layer how its inputs vary and belong together. Made "
        "once for a model, used for as many types as one likes.",
    ),
    (
        "Hessian",
        ("Hessians",),
        "guide",
        "For each pair of inputs of a layer, how much they move together. It says which errors can cancel out, "
        "and that is what error feedback needs to know.",
    ),
    (
        "error feedback",
        (),
        "guide",
        "Rounding weights one after another, each time nudging those not yet rounded so that they make up for "
        "the error just made. When a waiter has rounded one bill up, he rounds the next one down. It is the "
        "idea behind GPTQ.",
    ),
    (
        "GPTQ",
        (),
        "guide",
        "A method, error feedback between the columns of a layer (Frantar and others, 2022), and a file format "
        "for GPUs named after it. In Dither the method works for every format.",
    ),
    (
        "AWQ",
        (),
        "guide",
        "A method and a file format for GPUs (Lin and others, 2023): before rounding, the columns that matter "
        "are made larger and what feeds them smaller by as much, so that they lose less and the model computes "
        "the same.",
    ),
    (
        "NF4",
        ("NormalFloat",),
        "palette",
        "bitsandbytes' 4-bit type. Its sixteen values lie closer together near zero, where most weights are, "
        "as a ruler with finer marks where one measures most. Needs no data.",
    ),
    (
        "MXFP4",
        ("NVFP4",),
        "palette",
        "Four-bit floating-point numbers under a small shared scale, a standard of several makers of chips "
        "(NVFP4 is NVIDIA's). The newest GPUs multiply them directly; elsewhere they only save memory.",
    ),
    (
        "FP8",
        (),
        "guide",
        "Eight-bit floating-point numbers. Half the size of the usual sixteen bits at hardly any loss, without "
        "data; recent GPUs also compute with them twice as fast.",
    ),
    (
        "compressed-tensors",
        (),
        "guide",
        "A folder format that vLLM reads, with room for integers and floats of several widths, and for rounded "
        "activations. The numbers inside are much the same as in GPTQ files.",
    ),
    (
        "bitsandbytes",
        (),
        "guide",
        "A library that quantizes a model while it is loaded into transformers, without data. The usual basis "
        "for fine-tuning in 4 bits; slower than others at generating.",
    ),
    (
        "mixed precision",
        ("mixed types",),
        "inside",
        "Different types for different tensors of one file: more bits where errors hurt, fewer where they do "
        "not. Dither can measure what each tensor bears and spend the bytes accordingly.",
    ),
    (
        "rotation",
        ("rotate",),
        "guide",
        "Turning the numbers inside a model by a fixed amount and turning them back later: the result is the "
        "same, but outliers are spread evenly over many columns before anything is rounded. Like stirring "
        "before dividing the soup.",
    ),
    (
        "perplexity",
        ("PPL", "ΔPPL"),
        "which",
        "How surprised a model is by real text, as a number: 10 means that it hesitated, on average, as if "
        "between ten equally likely words. Lower is better. It compares with a text, not with the original, so "
        "two errors can hide each other; KL divergence cannot be fooled that way.",
    ),
    (
        "KL divergence",
        ("KLD", "Kullback-Leibler divergence"),
        "which",
        "How far the quantized model's predictions have moved away from the original's, averaged over every "
        "token of a text. 0 means they are the same; 0.01 is hard to notice, 0.1 can be felt, 1 is another "
        "model. Its unit is the nat.",
    ),
    ("nat", ("nats",), "which", "The unit of KL divergence, a bit's bigger sibling: 1 nat = 1.44 bits of information."),
    (
        "confidence interval",
        ("95 % interval", "interval"),
        "which",
        "Measured on other text, the number would come out a little different. The 95 % interval is where it "
        "would very probably lie. When the intervals of two files overlap widely, the difference may be luck.",
    ),
    (
        "same top token",
        ("same-top", "likeliest word"),
        "which",
        "How often both models find the same word likeliest. 95 % means that one word in twenty would be a "
        "different one, if both always took their favorite; mostly the two were close to begin with.",
    ),
    (
        "Pareto frontier",
        ("Pareto line", "frontier"),
        "which",
        "The files that nothing beats: every other file is either larger or loses more than one of them. "
        "Choose among those; which one depends only on how much room there is.",
    ),
    (
        "token",
        ("tokens",),
        "answers",
        "A piece of text that a model reads and writes at once: a short word, or part of a long one. 100 "
        "tokens are about 75 English words.",
    ),
    (
        "context",
        ("context length",),
        "fits",
        "How many tokens the model keeps in view: the conversation so far and the answer. A long context costs "
        "memory in the KV cache, so ask for what is needed, not for all the model could do.",
    ),
    (
        "KV cache",
        ("KV-cache", "cache"),
        "fits",
        "The model's notes about every token so far, kept so that they need not be computed again. It grows "
        "with the context and with the number of conversations, and can be larger than the model. It can be "
        "quantized too: q8_0 halves it.",
    ),
    (
        "slot",
        ("slots",),
        "fits",
        "One conversation held at the same time as others on a server. Each has its own KV cache.",
    ),
    (
        "VRAM",
        ("GPU memory",),
        "fits",
        "The memory on a graphics card, ten times as fast as the machine's own. What fits there runs fast; the "
        "rest waits for the slower memory.",
    ),
    (
        "memory bandwidth",
        ("bandwidth",),
        "speed",
        "How many bytes per second a processor can read from its memory. Writing a token means reading every "
        "weight once, so the bandwidth divided by the size of the file is about the speed that can be reached.",
    ),
    (
        "prefill",
        ("prompt processing",),
        "speed",
        "Reading the prompt. All its tokens are computed at once, so arithmetic decides how fast it is; this "
        "is the wait before the first word.",
    ),
    (
        "decode",
        ("decoding", "generation"),
        "speed",
        "Writing the answer, one token after another. Every token needs every weight once, so memory decides, "
        "and smaller files are faster.",
    ),
    (
        "tokens per second",
        ("tokens/s", "tok/s"),
        "speed",
        "The speed of a model. People read about 5 to 8 tokens per second; above that an answer flows faster "
        "than one reads.",
    ),
    (
        "PTQ",
        ("post-training quantization",),
        "guide",
        "Quantizing a finished model, in minutes to hours. What Dither does.",
    ),
    (
        "QAT",
        ("quantization-aware training",),
        "guide",
        "Training on with the rounding switched on, so that the model learns to live with it. Better at very "
        "few bits, at the cost of a training run.",
    ),
    (
        "LoRA",
        ("adapter", "adapters"),
        "guide",
        "Fine-tuning by learning a small addition instead of changing the model: two thin tables beside each "
        "large one. A few megabytes that can be put on and taken off.",
    ),
    (
        "QLoRA",
        (),
        "guide",
        "LoRA on top of a model that is quantized to 4 bits and stays frozen. It brought fine-tuning of large "
        "models to a single GPU.",
    ),
    (
        "relative error",
        (),
        "inside",
        "How large the rounding errors of a tensor are beside its weights. 5 % is usual at 4 bits. It tells "
        "what happened to the numbers, not yet what it did to the answers.",
    ),
    (
        "embedding",
        ("token embedding", "output matrix"),
        "fits",
        "The table that turns tokens into numbers at the start, and often back into words at the end. In small "
        "models it is a large part of the file, and usually kept finer than the rest.",
    ),
    (
        "llama.cpp",
        (),
        "speed",
        "The engine that runs GGUF files nearly everywhere; Ollama and LM Studio have it inside, and Dither "
        "runs it for chatting and measuring.",
    ),
    (
        "vLLM",
        (),
        "guide",
        "A server for GPUs that answers many requests at once. It reads GPTQ, AWQ, compressed-tensors and FP8 folders.",
    ),
)


def term_id(term: str) -> str:
    """The anchor of a term on the page, as the page's `glossaryId` makes it.

    >>> term_id("KL divergence"), term_id("K-quant")
    ('term-kl-divergence', 'term-k-quant')
    """
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")


GLOSSARY: list[dict[str, Any]] = [
    {"id": term_id(term), "term": term, "aliases": list(aliases), "view": view, "text": text}
    for term, aliases, view, text in sorted(_TERMS, key=lambda entry: entry[0].lower())
]
