"""How likely a model finds given answers: the sum of log p over their tokens, for thousands at once.

A multiple-choice benchmark asks nothing else of a model.  A server answers it position by position, with
one request for each; here all sequences walk through the network together, block by block, as they do when
a file is measured: each block is read and decoded once, and the output matrix meets only the positions
that count.  The walk takes a GGUF, a checkpoint and any packed folder alike, so that a quantized file and
its original are judged by one arithmetic: float32, with the weights that the file stands for.

    p(answer | question) = Π p(token | all before it);  greedy: every one of its tokens is the likeliest

Where all blocks fit into memory they are kept for the next walk.

Legend: S sequences, T positions, H hidden width, N positions that predict an answer's token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dither.errors import DitherError, UsageError
from dither.models.blocks import open_blocks
from dither.progress import Progress, Silent
from dither.types import Model

if TYPE_CHECKING:
    import torch

    from dither.models.blocks import Block, Head

BATCH = 4096  # tokens that go through a block together, padding included
WAVE = 2**30  # bytes of hidden states that wait between blocks
_LOGITS = 2**23  # that exist at a time
Asked = tuple[tuple[int, ...], tuple[int, ...]]  # the question's tokens and the answer's


class Likelihood:
    """Scores answers by one model.  Raises as `open_blocks`; `keep` bytes of blocks stay in memory."""

    def __init__(self, model: Model, *, device: str = "cpu", keep: int = 0, progress: Progress | None = None) -> None:
        self._blocks = open_blocks(model, device=device)
        self._report = progress or Silent()
        self._keep = 4 * model.parameters <= keep
        self._kept: dict[int, Block] = {}
        self._head: Head | None = None
        self.context: int = self._blocks.context
        self.notes = self._blocks.notes

    def score(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each answer after its question.

        Both hold at least one token.  Equal requests are computed once.  Raises UsageError for an empty
        one, DitherError where the model computes what is no number.
        """
        if any(not question or not answer for question, answer in asked):
            raise UsageError("a request", "has an empty question or answer", "Begin with the model's begin token.")
        keys: list[Asked] = [(tuple(question), tuple(answer)) for question, answer in asked]
        todo = sorted(set(keys), key=lambda key: -len(key[0]) - len(key[1]))
        found: dict[Asked, tuple[float, bool]] = {}
        self._report.start(len(todo), 0)
        for wave in self._waves(todo):
            found |= dict(zip(wave, self._walk(wave), strict=True))
            self._report.advance(len(wave), "answers")
        return [found[key] for key in keys]

    def _waves(self, todo: Sequence[Asked]) -> Iterator[list[Asked]]:
        """As many as may wait between two blocks."""
        room = max(1, WAVE // (4 * self._blocks.width))
        wave: list[Asked] = []
        tokens = 0
        for key in todo:
            size = len(key[0]) + len(key[1])
            if wave and tokens + size > room:
                yield wave
                wave, tokens = [], 0
            wave.append(key)
            tokens += size
        if wave:
            yield wave

    def _walk(self, wave: Sequence[Asked]) -> list[tuple[float, bool]]:
        import torch

        with torch.no_grad():
            batches = list(_batches(wave))
            states = [self._blocks.embed(_padded(batch)) for batch in batches]
            for index in range(self._blocks.count):
                block = self._block(index)
                states = [block(hidden_STH) for hidden_STH in states]
            return [
                result
                for batch, hidden_STH in zip(batches, states, strict=True)
                for result in self._results(batch, hidden_STH)
            ]

    def _block(self, index: int) -> Block:
        if index in self._kept:
            return self._kept[index]
        block = self._blocks.load(index)
        if self._keep:
            self._kept[index] = block
        return block

    def _results(self, batch: Sequence[Asked], hidden_STH: torch.Tensor) -> Iterator[tuple[float, bool]]:
        """An answer's token at position i is predicted by the state at i − 1."""
        import torch

        head = self._head or self._blocks.head()
        if self._keep:
            self._head = head
        rows: list[torch.Tensor] = []
        targets: list[int] = []
        for s, (question, answer) in enumerate(batch):
            start = len(question) - 1
            rows.append(hidden_STH[s, start : start + len(answer)])
            targets.extend(answer)
        hidden_NH, target_N = torch.cat(rows), torch.tensor(targets, device=hidden_STH.device)
        step = max(1, _LOGITS // self._blocks.vocabulary)
        logs, hits = [], []
        for at in range(0, len(hidden_NH), step):
            logits_NV = head(hidden_NH[None, at : at + step])[0].double()
            wanted_N = target_N[at : at + step]
            chosen_N = logits_NV.gather(1, wanted_N[:, None])[:, 0]
            logs.append(chosen_N - logits_NV.logsumexp(1))
            hits.append(logits_NV.argmax(1) == wanted_N)
        log_N, hit_N = torch.cat(logs).cpu(), torch.cat(hits).cpu()
        if not torch.isfinite(log_N).all():
            raise DitherError(self._blocks.model.origin, "computes what is no number", "Quantize the model again.")
        at = 0
        for _, answer in batch:
            span = slice(at, at + len(answer))
            yield float(log_N[span].sum()), bool(hit_N[span].all())
            at += len(answer)


def _batches(wave: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Neighbors in length together: the longest of a batch is its first."""
    batch: list[Asked] = []
    for key in wave:
        longest = len(batch[0][0]) + len(batch[0][1]) if batch else 0
        if batch and (len(batch) + 1) * longest > BATCH:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _padded(batch: Sequence[Asked]) -> torch.Tensor:
    """Token ids (S, T), right-padded: under causal attention nobody sees what comes behind.

    The last token of an answer predicts nothing that is asked, and is left out.
    """
    import torch

    longest = max(len(question) + len(answer) for question, answer in batch) - 1
    tokens_ST = torch.zeros(len(batch), longest, dtype=torch.int64)
    for s, (question, answer) in enumerate(batch):
        row = [*question, *answer][:-1]
        tokens_ST[s, : len(row)] = torch.tensor(row)
    return tokens_ST
