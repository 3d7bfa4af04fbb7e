"""How likely a model finds given answers: the sum of log p over their tokens, for thousands at once.

A multiple-choice benchmark asks nothing else of a model.  A server answers one request at a time; here all
sequences go through the network together, block by block, as when a file is measured: each block is read and
decoded once, and the output matrix is applied only to the positions that count.  It takes a GGUF, a checkpoint or
any packed folder, so that a quantized file and its original are judged by the same arithmetic: float32, with the
file's decoded weights.

    p(answer | question) = Π p(token | all before it);  greedy: every one of its tokens is the likeliest

If all blocks fit into memory they are kept for the next call.

Legend: S sequences, T positions, H hidden width, N positions that predict an answer's token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from dither.errors import DitherError, UsageError
from dither.models.blocks import open_blocks
from dither.progress import Progress, Silent
from dither.types import Model

if TYPE_CHECKING:
    import torch

BATCH = 4096  # tokens that go through a block together, padding included
WAVE = 2**30  # bytes of hidden states kept between blocks
_LOGITS = 2**23  # held at a time
Asked = tuple[tuple[int, ...], tuple[int, ...]]  # the question's tokens and the answer's


class Likelihood:
    """Scores answers by one model.  Raises as `open_blocks`; `keep` bytes of blocks stay in memory."""

    def __init__(self, model: Model, *, device: str = "cpu", keep: int = 0, progress: Progress | None = None) -> None:
        self._blocks = open_blocks(model, device=device)
        self._report = progress or Silent()
        kept: Callable[[Any], Any] = cache if 4 * model.parameters <= keep else lambda load: load
        self._block, self._head = kept(self._blocks.load), kept(self._blocks.head)
        self.context: int = self._blocks.context
        self.notes = self._blocks.notes

    def score(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each answer after its question.

        Both must have at least one token.  Equal requests are computed once.  Raises UsageError for an empty one,
        DitherError if the model computes NaN or infinity.
        """
        if any(not question or not answer for question, answer in asked):
            raise UsageError("a request", "has an empty question or answer", "Begin with the model's begin token.")
        keys: list[Asked] = [(tuple(question), tuple(answer)) for question, answer in asked]
        todo = sorted(set(keys), key=_length, reverse=True)
        found: dict[Asked, tuple[float, bool]] = {}
        self._report.start(len(todo), 0)
        room = max(1, WAVE // (4 * self._blocks.width))  # tokens whose hidden states are kept between blocks
        for wave in _groups(todo, lambda wave, key: sum(map(_length, wave)) + _length(key) <= room):
            found |= dict(zip(wave, self._walk(wave), strict=True))
            self._report.advance(len(wave), "answers")
        return [found[key] for key in keys]

    def _walk(self, wave: Sequence[Asked]) -> list[tuple[float, bool]]:
        import torch

        with torch.no_grad():
            # Sorted by length, so that the longest of a batch is its first: the others are padded to it.
            batches = list(_groups(wave, lambda batch, _: (len(batch) + 1) * _length(batch[0]) <= BATCH))
            states = [self._blocks.embed(_padded(batch)) for batch in batches]
            for index in range(self._blocks.count):
                block = self._block(index)
                states = [block(hidden_STH) for hidden_STH in states]
            return list(chain.from_iterable(map(self._results, batches, states)))

    def _results(self, batch: Sequence[Asked], hidden_STH: torch.Tensor) -> Iterator[tuple[float, bool]]:
        import torch

        head = self._head()
        # An answer's token at position i is predicted by the state at i − 1.
        starts = [len(question) - 1 for question, _ in batch]
        rows = [hidden_STH[s, at : at + len(batch[s][1])] for s, at in enumerate(starts)]
        targets = [token for _, answer in batch for token in answer]
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
            raise DitherError(self._blocks.model.origin, "computes NaN or infinity", "Quantize the model again.")
        sizes = [len(answer) for _, answer in batch]
        for own_N, right_N in zip(torch.split(log_N, sizes), torch.split(hit_N, sizes), strict=True):
            yield float(own_N.sum()), bool(right_N.all())


def _length(key: Asked) -> int:
    return len(key[0]) + len(key[1])


def _groups(keys: Sequence[Asked], fits: Callable[[list[Asked], Asked], bool]) -> Iterator[list[Asked]]:
    """The keys in order, in groups that grow as long as the next key `fits`."""
    group: list[Asked] = []
    for key in keys:
        if group and not fits(group, key):
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def _padded(batch: Sequence[Asked]) -> torch.Tensor:
    """Token ids (S, T), right-padded: under causal attention no position sees those after it.

    The last token of an answer predicts nothing that was asked, and is left out.
    """
    import torch

    rows = [torch.tensor([*question, *answer][:-1]) for question, answer in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
