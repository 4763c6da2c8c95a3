"""Log-probabilities of labels, cut over the vocabulary, chunked over tokens: the full [tokens, vocabulary] logits never exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_LOGITS = 1 << 24  # logits that exist at a time, on each rank (fp32: 64 MiB)


def label_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    banned_token_ids: Sequence[int] = (),
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """fp32 [N] log-probabilities of labels under softmax(hidden @ weight.T / temperature), and entropies [N] when asked for.

    hidden [N, H], the same on every tensor-parallel rank; weight [V / TP, H], this rank's part of the vocabulary;
    labels int64 [N].
    `banned_token_ids` have probability zero, as in sampling. Differentiable in hidden (whose gradient is summed over the ranks)
    and weight; the entropy is not. Backward computes each chunk's logits again.
    """
    start = dist.get_rank(tp_group) * weight.shape[0]
    banned = [token - start for token in banned_token_ids if start <= token < start + weight.shape[0]]
    banned_index = torch.tensor(banned, dtype=torch.int64, device=weight.device) if banned else None
    log_probs, entropy = _LabelLogProbs.apply(hidden, weight, labels - start, banned_index, temperature, tp_group, with_entropy)
    return log_probs, entropy if with_entropy else None


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor | None, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits if banned is None else logits.index_fill_(1, banned, float("-inf"))


def _reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        banned: Tensor | None,
        temperature: float,
        group: dist.ProcessGroup,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        mine = (labels >= 0) & (labels < weight.shape[0])
        local = torch.where(mine, labels, 0)
        chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
        log_probs, normalizers, entropies = [], [], []
        for rows in torch.arange(hidden.shape[0], device=hidden.device).split(chunk):
            logits = _logits(hidden[rows], weight, banned, temperature)
            top = _reduce(logits.amax(dim=1), dist.ReduceOp.MAX, group)
            exponent = (logits - top.unsqueeze(1)).exp()
            target = torch.where(mine[rows], logits.gather(1, local[rows].unsqueeze(1)).squeeze(1), 0.0)
            sums = [exponent.sum(dim=1), target]
            if with_entropy:
                sums.append((exponent * torch.where(exponent > 0, logits, 0.0)).sum(dim=1))
            total = _reduce(torch.stack(sums), dist.ReduceOp.SUM, group)
            normalizer = total[0].log() + top
            log_probs.append(total[1] - normalizer)
            normalizers.append(normalizer)
            if with_entropy:
                entropies.append(normalizer - total[2] / total[0])
        empty = hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, local, mine, torch.cat([empty, *normalizers]), banned)
        ctx.temperature, ctx.group, ctx.chunk = temperature, group, chunk
        entropy = torch.cat([empty, *entropies])
        ctx.mark_non_differentiable(entropy)
        return torch.cat([empty, *log_probs]), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, mine, normalizer, banned = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in torch.arange(hidden.shape[0], device=hidden.device).split(ctx.chunk):
            logits = _logits(hidden[rows], weight, banned, ctx.temperature)
            scaled = grad[rows] / ctx.temperature
            # d log p(label) / d logit = [token is label] - p(token)
            grad_logits = (logits - normalizer[rows].unsqueeze(1)).exp_().mul_(-scaled.unsqueeze(1))
            grad_logits.scatter_add_(1, local[rows].unsqueeze(1), torch.where(mine[rows], scaled, 0.0).unsqueeze(1))
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = (grad_logits @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad_logits.t() @ hidden[rows]).float()
        _reduce(grad_hidden, dist.ReduceOp.SUM, ctx.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None
