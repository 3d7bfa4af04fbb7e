"""A reader of Modelfiles, after Ollama's documentation (docs/modelfile.md), stricter than Ollama itself.

    # comment
    INSTRUCTION arguments

Instructions are not case-sensitive and may come in any order; FROM is required.  Text over several lines
stands between triple quotes.  PARAMETER takes one of the documented names and a value of its kind.
"""

from __future__ import annotations

KINDS = {
    "num_ctx": int,
    "repeat_last_n": int,
    "seed": int,
    "num_predict": int,
    "top_k": int,
    "repeat_penalty": float,
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "stop": str,
}
PLAIN = ("FROM", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE")
QUOTES = '"""'


def read(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) pairs; a parameter's instruction is `PARAMETER name`.  Asserts the grammar."""
    found: list[tuple[str, str]] = []
    while text:
        line, _, rest = text.partition("\n")
        if not line.strip() or line.lstrip().startswith("#"):
            text = rest
            continue
        word, _, argument = line.partition(" ")
        instruction = word.upper()
        if instruction == "PARAMETER":
            name, _, argument = argument.partition(" ")
            assert name in KINDS, f"no parameter {name}"
            value, text = _argument(argument, rest)
            KINDS[name](value)
            found.append((f"PARAMETER {name}", value))
        elif instruction == "MESSAGE":
            role, _, argument = argument.partition(" ")
            assert role in ("system", "user", "assistant")
            value, text = _argument(argument, rest)
            found.append((f"MESSAGE {role}", value))
        else:
            assert instruction in PLAIN, f"no instruction {word!r}"
            value, text = _argument(argument, rest)
            found.append((instruction, value))
    assert [name for name, _ in found].count("FROM") == 1
    return found


def _argument(argument: str, rest: str) -> tuple[str, str]:
    if argument.startswith(QUOTES):
        whole = argument[len(QUOTES) :] + "\n" + rest
        inside, closed, after = whole.partition(QUOTES)
        assert closed, "an open triple quote"
        line, _, after = after.partition("\n")
        assert not line.strip(), f"{line!r} behind the closing quotes"
        return inside, after
    if argument.startswith('"'):
        assert argument.endswith('"') and len(argument) > 1 and '"' not in argument[1:-1]
        return argument[1:-1], rest
    assert argument.strip()
    return argument, rest
