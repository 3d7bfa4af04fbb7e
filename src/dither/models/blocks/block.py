"""One decoder block with its weights in memory, and the head behind the last block.

Both are transformers' modules under GGUF's names: a matrix is read, replaced and reported as the GGUF
has it, whatever transformers fused or permuted.

Legend: S sequences, T tokens of each, H hidden width, R rows, C columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from dither.errors import UsageError
from dither.models.arch.changes import Change
from dither.models.blocks.restore import Restored
from dither.models.blocks.surroundings import Surroundings
from dither.models.blocks.watch import Linears, Pull, See, SeePull, Tracing, squared_norm
from dither.types import Floats

_LOGITS = 2**22  # drawn from at a time: 16 MiB, which are had again without page faults
_FEWEST = 128  # positions at a time: more would not use a wide output matrix better


class Block:
    """One decoder block.  Dropping it frees its weights."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        plans: Mapping[str, Restored],
        names: tuple[str, ...],
        surroundings: Surroundings,
    ) -> None:
        self.index = index
        self.names = names  # its matrices, stacks of experts included: "blk.3.attn_q.weight"
        self._layer = layer
        self._plans = plans  # by the parameter's name within the layer
        self._surroundings = surroundings
        self._homes = {name: (key, at) for key, plan in plans.items() for at, name in enumerate(plan.tensors)}

    def __call__(self, hidden_STH: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The block's output for whole sequences from position 0, causal, without a cache.

        `weights` replaces tensors by name, given in GGUF's shape and order of rows.  Gradients flow to
        those of them that ask for one; otherwise none are recorded.  Raises UsageError for a name that
        is not of this block, or another shape.
        """
        replaced = self._parameters(weights or {})
        is_trained = any(w.requires_grad for w in (weights or {}).values())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            return self._forward(hidden_STH, replaced)

    def watch(self, hidden_STH: torch.Tensor, see: See) -> torch.Tensor:
        """The same output; `see` is called once for every distinct input of the block's matrices.

        An expert reports only tokens that were routed to it, in two calls (gate and up, then down); one
        without tokens is not reported.
        """
        watching = Linears(self._matrices(), lambda given: given.report(see))
        with torch.no_grad(), watching:
            output_STH = self._forward(hidden_STH, {})
        watching.close()
        return output_STH

    def trace(self, hidden_STH: torch.Tensor, back_STH: torch.Tensor, see: SeePull) -> torch.Tensor:
        """Carries `back_STH`, a loss's gradient by the block's output, back to its input, which is returned.

        `see` is called as by `watch`, with the gradients by every matrix's output.
        """
        return self.there(hidden_STH).back(back_STH, see)

    def there(self, hidden_STH: torch.Tensor) -> There:
        """The block's output, which remembers how it came about until a gradient is carried back."""
        given_STH = hidden_STH.detach().requires_grad_()
        tracing = Tracing(self._matrices())
        with torch.enable_grad(), tracing:
            output_STH = self._forward(given_STH, {})
        tracing.close()
        return There(given_STH, output_STH, tracing, self._rows_of)

    def _matrices(self) -> dict[torch.Tensor, tuple[str, ...]]:
        found = {parameter: self._plans[key].tensors for key, parameter in self._layer.named_parameters()}
        return {parameter: names for parameter, names in found.items() if names[0] in self.names}

    def _rows_of(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Which features of the output of these matrices, computed together, are whose."""
        plan = self._plans[self._home(names[0])[0]]
        return dict(zip(plan.tensors, plan.rows(), strict=True))

    def weight(self, name: str) -> torch.Tensor:
        """A tensor in GGUF's shape and order of rows: a float32 copy."""
        change, view, shape = self._view(name)
        w: torch.Tensor = change.apply(view.detach().to(torch.float32, copy=True)).reshape(shape)
        return w

    def set_weight(self, name: str, w: torch.Tensor | Floats) -> None:
        """Replaces a tensor, given in GGUF's shape and order of rows."""
        change, view, shape = self._view(name)
        given = torch.from_numpy(np.array(w, np.float32)) if isinstance(w, np.ndarray) else w.detach().float()
        _check_shape(name, given, shape)
        view.copy_(change.undo(given).reshape(view.shape))

    def _forward(self, hidden_STH: torch.Tensor, replaced: dict[str, torch.Tensor]) -> torch.Tensor:
        around = self._surroundings(self.index, hidden_STH.shape[1])
        if replaced:
            found = functional_call(self._layer, replaced, (hidden_STH,), around)
        else:
            found = self._layer(hidden_STH, **around)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def _parameters(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layer's parameters that differ, made from the tensors given and, of fused ones, the others."""
        found = {}
        for name, w in weights.items():
            _check_shape(name, w, self._view(name)[2])
        for key in dict.fromkeys(self._home(name)[0] for name in weights):
            plan, own = self._plans[key], self._layer.get_parameter(key)
            stored = [weights[name] if name in weights else self.weight(name) for name in plan.tensors]
            found[key] = plan.join(stored).to(own.device, own.dtype)
        return found

    def _view(self, name: str) -> tuple[Change, torch.Tensor, tuple[int, ...]]:
        key, at = self._home(name)
        plan, own = self._plans[key], self._layer.get_parameter(key)
        return plan.parts[at].change, plan.views(own.data)[at], plan.shapes()[at]

    def _home(self, name: str) -> tuple[str, int]:
        if name not in self._homes:
            raise UsageError(f"tensor {name}", f"is not part of block {self.index}")
        return self._homes[name]


@dataclass(frozen=True)
class There:
    """A block's way there, with all that the way back needs: the activations of one batch."""

    given_STH: torch.Tensor
    output_STH: torch.Tensor
    tracing: Tracing
    rows_of: Callable[[tuple[str, ...]], Mapping[str, torch.Tensor]]

    @property
    def reached(self) -> torch.Tensor:
        """The output, (S, T, H), without its past."""
        return self.output_STH.detach()

    def back(self, back_STH: torch.Tensor, see: SeePull) -> torch.Tensor:
        """As `Block.trace`.  Once: the memory is freed on the way."""
        inputs, pulled_STH = [self.given_STH, *self.tracing.outputs], back_STH.to(self.output_STH.dtype)
        found, *gradients = torch.autograd.grad(self.output_STH, inputs, pulled_STH, allow_unused=True)
        self.tracing.report(gradients, self.rows_of, see)
        return found


class Head:
    """The last norm and the output matrix."""

    def __init__(self, norm: nn.Module, name: str, output_VH: torch.Tensor, softcap: float | None) -> None:
        self.names = (name,)
        self._norm = norm
        self._output_VH = output_VH
        self._softcap = softcap

    @torch.no_grad()
    def __call__(self, hidden_STH: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (S, T, V)."""
        return self._capped(functional.linear(self._norm(hidden_STH), self._output_VH).float())

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits

    def trace(
        self, hidden_STH: torch.Tensor, valid_ST: torch.Tensor, draw: torch.Generator, see: SeePull
    ) -> torch.Tensor:
        """The gradient of Σ log p(y) by the hidden states, each valid position's y drawn from its own p.

        Over draws its products average to the Fisher information, the curvature of the KL divergence that
        a change of weights causes (Martens 2020, arXiv:1412.1193, section 5).  `see` hears of the output
        matrix's input and of how strongly each position pulls.
        """
        back_STH = torch.empty(hidden_STH.shape, dtype=torch.float32, device=hidden_STH.device)
        flat_NH, back_NH = hidden_STH.reshape(-1, hidden_STH.shape[-1]), back_STH.view(-1, back_STH.shape[-1])
        valid_N = valid_ST.reshape(-1).to(hidden_STH.device)
        step = max(_FEWEST, _LOGITS // len(self._output_VH))
        for start in range(0, len(flat_NH), step):
            at = slice(start, min(start + step, len(flat_NH)))
            given_NH = flat_NH[at].detach().requires_grad_()
            with torch.enable_grad():
                x_NC = self._norm(given_NH)
            g_NV = self._drawn(x_NC.detach(), draw)
            if not valid_N[at].all():
                g_NV[~valid_N[at]] = 0
            pulled_NC = (g_NV.to(self._output_VH.dtype) @ self._output_VH).to(x_NC.dtype)
            back_NH[at] = torch.autograd.grad(x_NC, given_NH, pulled_NC)[0].float()
            position_N = torch.arange(at.start, at.stop, device=x_NC.device)
            pull = Pull(squared_norm(g_NV), {self.names[0]: g_NV}, apart=True)
            see(self.names, x_NC.detach().float(), position_N, None, pull)
        return back_STH

    @torch.no_grad()
    def _drawn(self, x_NC: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """∂ log p(y) / ∂z = one-hot(y) − p by the output matrix's own products z, for drawn y."""
        capped_NV = self._capped(functional.linear(x_NC, self._output_VH).float())
        p_NV = capped_NV.softmax(dim=-1)
        y_N1 = drawn(p_NV.to(draw.device), draw).to(p_NV.device)
        g_NV = p_NV.neg_().scatter_add_(1, y_N1, torch.ones_like(y_N1, dtype=torch.float32))
        if self._softcap is not None:  # z ↦ cap · tanh(z / cap) has slope 1 − tanh²
            g_NV *= 1 - (capped_NV / self._softcap).square_()
        return g_NV

    @torch.no_grad()
    def watch(self, hidden_STH: torch.Tensor, see: See) -> None:
        """Calls `see` with the output matrix's input; no logits are computed."""
        x_NC = self._norm(hidden_STH).reshape(-1, hidden_STH.shape[-1]).float()
        see(self.names, x_NC, torch.arange(len(x_NC), device=x_NC.device), None)


def drawn(p_NV: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """One number of each row's distribution, int64 (N, 1): the first whose cumulative probability lies above
    a uniform draw.  `torch.multinomial` draws as many numbers as there are words."""
    cumulative_NV = p_NV.cumsum(dim=-1)
    u_N1 = torch.rand(len(p_NV), 1, generator=draw, device=p_NV.device) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, u_N1, right=True).clamp_(max=p_NV.shape[1] - 1)


def _check_shape(name: str, w: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(w.shape) != shape:
        raise UsageError(f"tensor {name}", f"is given as {list(w.shape)}, but has shape {list(shape)}")
