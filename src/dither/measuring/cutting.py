"""Token ids cut into what a context holds."""

from __future__ import annotations


def chunks(ids: list[int], context: int, bos: int | None) -> list[list[int]]:
    """llama.cpp's chunks of one long text: consecutive, all full, each beginning with `bos`."""
    stream = ids if bos is None else [bos, *ids]
    found = [stream[at : at + context] for at in range(0, len(stream) - context + 1, context)]
    return found if bos is None else [[bos, *chunk[1:]] for chunk in found]


def pieces(ids: list[int], context: int, bos: int | None) -> list[list[int]]:
    """One record's ids, `bos` in front, cut into pieces of the context's length; the last may be shorter."""
    ids = with_bos(ids, bos)
    found = [ids[at : at + context] for at in range(0, len(ids), context)]
    return found if bos is None else [[bos, *piece[1:]] for piece in found]


def with_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
