r"""Which of llama.cpp's pre-tokenizers a byte-level BPE tokenizer has.

Before merging, text is cut into words by a chain of regular expressions, and the merges were learnt on
words cut that way: with another chain a model reads digits, spaces and contractions in pieces it has
never seen.  tokenizer.json holds the chain; llama.cpp holds a fixed list of chains and a GGUF names one.

The chain alone decides here.  It is read out of the JSON as a tuple of expressions and looked up in
`CHAINS`; model names play no part, and an unknown chain is an error.  Several names stand for one
chain in llama.cpp (`starcoder`, `refact`, `smollm` …): the table has one of them.

    tokenizer.json                        as an expression
    Split(regex, Isolated)                the regex itself
    Digits(individual_digits)             \p{N}, or \p{N}+ when digits stay together
    ByteLevel(use_regex)                  GPT-2's regex; without use_regex, nothing
    Punctuation(Contiguous)               <Punctuation Contiguous>, which no regex of ours equals

Source: `llm_tokenizer_bpe` and the list of names below it in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dither.errors import UnsupportedError, UsageError
from dither.models.json_object import JsonObject
from dither.system.text import shown

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = "<Punctuation Contiguous>"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CL100K = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{TAIL}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{TAIL}"
# tiktoken's spelling of the same language: possessive where nothing could be given back anyway, and
# one newline after white space that has taken all the others already.
CL100K_TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = rf"{UPPER}{CONTRACTIONS}?|{LOWER}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{CASED_TAIL}"
TEKKEN = rf"{UPPER}|{LOWER}|\p{{N}}|{CASED_TAIL}"
DEEPSEEK_3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CJK = "[一-龥\u0800-一가-\ud7ff]+"
KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
# Letters that have case; where composing (NFC) would change one, it is spelled as an escape.
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-"
    "ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BAILING = CL100K_TIKTOKEN.replace("{1,3}", "")
EXAONE_MOE = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS_SPACES = "|".join(rf"\s{{{run}}}(?!\S)" for run in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"
DEEPSEEK_SIGNS = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"
MARKS_SPLIT = (
    "llama.cpp's pattern takes combining marks for punctuation: Hindi, Thai and others that write vowels "
    "with them may be cut otherwise"
)


@dataclass(frozen=True)
class Chain:
    """One of llama.cpp's pre-tokenizers, and the expressions by which a tokenizer.json is known for it."""

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken whole, without merging ("ignore_merges")
    caveat: str = ""


CHAINS = (
    Chain("gpt-2", (GPT2,)),
    Chain("smollm", (r"\p{N}", GPT2)),
    Chain("llama-bpe", (CL100K,), whole_words=True),
    Chain("llama-bpe", (CL100K_TIKTOKEN,), whole_words=True),
    Chain("dbrx", (CL100K,)),
    Chain("dbrx", (CL100K_TIKTOKEN,)),
    Chain("qwen2", (QWEN2,)),
    Chain("qwen35", (QWEN35,)),
    Chain("ufakzeka", (QWEN2.removeprefix(CONTRACTIONS + "|"),)),
    Chain("jais-2", (CL100K.replace(r"\s+(?!\S)|\s+", JAIS_SPACES),)),
    Chain("minicpm5", (r"\p{N}{1,3}", CL100K.replace("{1,3}", "+")), whole_words=True),
    Chain("gpt-4o", (O200K,), caveat=MARKS_SPLIT),
    Chain("tekken", (TEKKEN,), whole_words=True, caveat=MARKS_SPLIT),
    Chain("seed-coder", (SEED,)),
    Chain("bailingmoe", (BAILING,)),
    Chain("exaone-moe", (EXAONE_MOE,)),
    Chain("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    Chain("bloom", (BLOOM,)),
    Chain("deepseek-v3", (r"\p{N}{1,3}", KANA, DEEPSEEK_3)),
    Chain("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}")),
    # llama.cpp's versions of these two cut less, only where no merge learnt under the chain could lead.
    Chain("deepseek-llm", (r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_SIGNS, r"\s+$", DEEPSEEK_CJK, r"\p{N}")),
    Chain("falcon", (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)

# Every name llama.cpp knows for byte-level BPE, for `--pre`.
_NAMES = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx
deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon
falcon-h1 falcon3 gigachat glm4 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-97m grok-2
hunyuan hunyuan-dense hy_v4 jais jais-2 jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm
kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama3 llama4 megrez mellum mellum2 midm-2.0
minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe
seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion
ufakzeka viking youtu
"""
NAMES = tuple(_NAMES.split())


def checked_name(name: str, chains: Sequence[Chain] = ()) -> str:
    """`name` if llama.cpp knows it, or `chains` have it.  Raises UsageError listing what is known."""
    known = sorted({*NAMES, *(chain.name for chain in chains)})
    if name not in known:
        way_out = f"Choose one of {', '.join(known)}."
        raise UsageError(f"--pre {name}", "is no pre-tokenizer that llama.cpp knows", way_out)
    return name


def decide(tokenizer: JsonObject, chains: Sequence[Chain] = ()) -> tuple[str, list[str]]:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, and notes on what it does otherwise.

    `chains` are looked at before those that are known to all.  Raises UnsupportedError that shows a chain or a
    normalizer which llama.cpp does not have.
    """
    chain = tuple(steps(tokenizer.section("pre_tokenizer")))
    whole_words = bool(tokenizer.section("model").get("ignore_merges", False))
    fitting = sorted(
        (known for known in (*chains, *CHAINS) if known.steps == chain),
        key=lambda known: known.whole_words != whole_words,
    )
    if not fitting:
        listed = " then ".join(repr(step) for step in chain) or "none at all"
        raise UnsupportedError(
            "the tokenizer's pre-tokenizer",
            f"is not one that llama.cpp is known to have: {shown(listed, 2000)}",
            f"If you know which of llama.cpp's it equals, say --pre NAME: one of {', '.join(NAMES)}.",
        )
    found = fitting[0]
    notes = list(normalizer_notes(tokenizer.section("normalizer")))
    if found.whole_words != whole_words:
        notes.append(
            f"ignore_merges is {str(whole_words).lower()} in tokenizer.json and the opposite in llama.cpp's "
            f"{found.name!r}: a rare word that no merge leads to may be cut otherwise"
        )
    return found.name, notes + ([found.caveat] if found.caveat else [])


def steps(node: JsonObject) -> Iterator[str]:
    """The chain of a `pre_tokenizer`, expressions spelled with escapes instead of control characters."""
    for part in node.within("pretokenizers"):
        kind = part.text("type")
        if kind == "Split":
            yield _split(part)
        elif kind == "Digits":
            yield r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
        elif kind == "ByteLevel":
            if part.get("add_prefix_space", True):
                yield "<ByteLevel add_prefix_space>"
            if part.get("use_regex", True):
                yield GPT2
        elif part and kind != "Sequence":
            yield f"<{kind} {part.text('behavior') or ''}".rstrip() + ">"


def _split(node: JsonObject) -> str:
    pattern, behavior, invert = node.section("pattern"), node.text("behavior"), bool(node.get("invert"))
    regex = pattern.get("Regex")
    # Cutting out what does not match, and isolating what does, agree where the regex matches everything.
    plain = (behavior, invert) == ("Isolated", False) or (
        (behavior, invert) == ("Removed", True) and str(regex).endswith((r"|\s+", r"|\s+(?!\S)"))
    )
    if not isinstance(regex, str) or not plain:
        texts = {key: pattern.text(key) for key in pattern}
        return f"<Split {texts} {behavior}{' inverted' if invert else ''}>"
    return regex.replace("\r", r"\r").replace("\n", r"\n")


def normalizer_notes(node: JsonObject) -> Iterator[str]:
    """llama.cpp normalizes nothing before BPE.  Composition (NFC) changes little text and is told.

    Raises UnsupportedError for anything else.
    """
    for inner in node.within("normalizers"):
        kind = inner.text("type")
        if kind == "NFC":
            yield "the tokenizer composes accents (NFC) and llama.cpp does not: decomposed text is cut otherwise"
        elif inner and kind != "Sequence":
            reason = "is not something llama.cpp does before BPE"
            raise UnsupportedError(f"the tokenizer's normalizer {kind}", reason, "--pre NAME converts without it.")


# What llama.cpp cuts by where a file names none, and a chain that only a GGUF's name leads to.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
NAMED = (Chain("default", _DEFAULT), Chain("glm4", (CL100K,), whole_words=True), Chain("viking", (BLOOM, r"\p{N}")))
# Further names of a chain above.  Source: `llama_vocab::impl::load` and `llm_tokenizer_bpe` of llama.cpp.
_ALIASES = """
llama-bpe: llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano
gpt-2: phi-2 jina-es jina-de jina-v1-en jina-v2-code jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert
gpt-2: roberta-bpe exaone4 mpt olmo jais trillion granite-docling
smollm: starcoder refact command-r codeshell exaone minerva-7b mellum2
qwen2: deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2
dbrx: smaug-bpe chatglm-bpe
bloom: poro-chat gpt3-finnish
glm4: glm5
deepseek-v3: hunyuan-dense joyai-llm hy_v4
gpt-4o: llama4 kanana2 talkie minimax-m2
bailingmoe: bailingmoe2 llada-moe
"""
ALIASES = {
    alias: name for name, _, rest in (line.partition(": ") for line in _ALIASES.split("\n")) for alias in rest.split()
}
ADDS_BOS = ("llama-bpe", "tekken")  # unless a file says otherwise


def chain_of(name: str, chains: Sequence[Chain] = ()) -> Chain:
    """The chain that a GGUF names.  Raises UnsupportedError where its expressions are not known here."""
    known = ALIASES.get(name, name)
    found = next((chain for chain in (*chains, *CHAINS, *NAMED) if chain.name in (name, known)), None)
    if found is None:
        reason = f"is {shown(name)}, whose expressions are not known here"
        way_out = "Convert the checkpoint that the GGUF was made from, or name an equal one with --pre NAME."
        raise UnsupportedError("metadata tokenizer.ggml.pre", reason, way_out)
    return found


def components(chain: Chain) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json that cuts as this chain does: `steps`, read backwards."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    known: dict[str, dict[str, Any]] = {
        GPT2: {**byte_level, "use_regex": True},
        r"\p{N}": {"type": "Digits", "individual_digits": True},
        r"\p{N}+": {"type": "Digits", "individual_digits": False},
        PUNCTUATION: {"type": "Punctuation", "behavior": "Contiguous"},
    }
    parts = [known.get(step) or _isolated(step) for step in chain.steps]
    if GPT2 not in chain.steps:
        parts.append({**byte_level, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


def _isolated(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
