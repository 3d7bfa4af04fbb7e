"""Types of tensors that some program has and this one cannot decode, by their numbers in GGUF.

Numbers below 100 are ggml's own; what it once had and dropped is not given out again.  Forks number theirs as
they like: ik_llama.cpp from 97, its rows interleaved from 200 (`ggml/include/ggml.h` in both).  A file with
such a type is sound, so a person is told which program reads it instead of to fetch it again.
"""

from __future__ import annotations

_BY_NUMBER = {
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 4: "Q4_2", 5: "Q4_3",
    36: "I2_S", 41: "Q1_0", 42: "Q2_0",
    97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64",
    137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS",
    146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL",
    158: "IQ1_KT",
}  # fmt: skip
_DROPPED = (4, 5, 31, 32, 33, 37, 38)
_BITNET = 36  # once llama.cpp's IQ4_NL_4_4 as well, of which no files are known
_FORK = range(97, 400)
_INTERLEAVED = 200  # and above: rows of a type interleaved for one kind of processor
_ORIGINAL = "quantize the model's original weights again"


def foreign_type(number: int) -> tuple[str, str]:
    """What to say of a tensor of this type: the reason, and the way out.

    >>> foreign_type(139)[0]
    "is stored as IQ4_K (type 139), which only the fork ik_llama.cpp has"
    """
    name = _BY_NUMBER.get(number)
    known = f"{name} (type {number})" if name else f"type {number}"
    if number in _DROPPED:
        plain = "IQ4_NL" if "IQ4_NL" in str(name) else "Q4_0"
        way_out = f"Take the {plain} file of the model, which engines now arrange as they load it, or {_ORIGINAL}."
        return f"is stored as {known}, which llama.cpp dropped", way_out
    if number == _BITNET:
        reason = f"is stored as {known}, which only bitnet.cpp and other forks of llama.cpp have"
        return reason, "Run it with bitnet.cpp, or take a TQ2_0 or a BF16 file of the model."
    if number in _FORK:
        what = " with its rows interleaved" if number >= _INTERLEAVED else ""
        reason = f"is stored as {known}{what}, which only the fork ik_llama.cpp has"
        return reason, f"Run it with ik_llama.cpp; for anything else {_ORIGINAL}."
    if name:
        reason = f"is stored as {known}, which llama.cpp has and nothing here decodes yet"
        return reason, f"To have another type, {_ORIGINAL}."
    reason = f"is stored as {known} of ggml, which is not known here"
    return reason, "The file is of a newer llama.cpp or of a fork, or damaged: take a GGUF of another type."
