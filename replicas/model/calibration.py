"""Statistics of a model's keys and queries, and the static transform of K that they make best.

A page stores K' = R((K - shift) / scale), and queries are multiplied by the same scale. Rounding adds noise
of one size to all channels of K', so its effect on a logit grows with the sum over channels of
(scale x query)^2, while its size grows with the sum of (deviation of K / scale)^2. Their product is least for
scale = sqrt(deviation of K / root mean square of Q): the balance that SmoothQuant strikes between
activations and weights. The shift is K's mean, which soft-max cancels (not under a logit soft-cap).

V has no such transform: measured on real models, none improved on its rotation.

Names: L layers, H kv heads, Q query heads, D head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quire.kernels.cache_view import AttentionSpec
from quire.kernels.formats import LayerFormat, Transform
from quire.kernels.ref.paged import attend_numbers
from quire.replicas.model.attention import layer_index

_LEAST_DEVIATION = 2.0**-10
"""Of a channel, as a share of its head's largest: one that never changes would divide by zero."""

_TINY = 1e-30


class _Moments:
    """A step of one sequence without pages, which sums up the moments of every layer."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        k, q = k_THD.double(), q_TQD.double().unflatten(1, (k_THD.shape[1], -1))
        self.sums[layer_index(module)] = torch.stack(
            [k.sum(0), k.square().sum(0), q.square().mean(2).sum(0)], 0
        )
        return attend_numbers(q_TQD.float(), k_THD.float(), v_THD.float(), spec).to(q_TQD.dtype)


@torch.inference_mode()
def key_moments(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Sum up K, K squared and Q squared of each channel over the tokens of one text.

    Returns fp64 [L, 3, H, D] of this shard's kv heads; Q squared is the mean over a head's query heads.
    """
    ids_1T = torch.tensor([token_ids], device=model.device)
    positions_1T = torch.arange(len(token_ids), device=model.device)[None]
    step = _Moments()
    model(
        input_ids=ids_1T,
        position_ids=positions_1T,
        use_cache=False,
        step=step,
        logits_to_keep=positions_1T[0, -1:],
    )
    return torch.stack([step.sums[layer] for layer in sorted(step.sums)])


def key_transform(sums_3HD: Tensor, tokens: int, *, shift: bool) -> tuple[Tensor | None, Tensor]:
    """Compute the balanced shift and scale, fp32 [H, D], from a layer's moments over this many tokens.

    Stored keys have a root mean square of 1. Without `shift` it is None.
    """
    mean_HD, square_HD, query_HD = (sums_3HD / tokens).unbind()
    spread_HD = (square_HD - mean_HD.square()).clamp_min(0) if shift else square_HD
    k_HD, q_HD = _floored(spread_HD.sqrt()), _floored(query_HD.sqrt())
    scale_HD = (k_HD / q_HD).sqrt()
    scale_HD = scale_HD * (k_HD / scale_HD).square().mean(-1, keepdim=True).sqrt()
    return mean_HD.float() if shift else None, scale_HD.float()


def _floored(x_HD: Tensor) -> Tensor:
    return torch.maximum(x_HD, _LEAST_DEVIATION * x_HD.amax(-1, keepdim=True)).clamp_min(_TINY)


def calibrated_formats(formats: Sequence[LayerFormat], layers: Iterable[int]) -> tuple[LayerFormat, ...]:
    """Return the formats with affine and rotated keys on these layers, where keys are quantized."""
    chosen = {i for i in layers if formats[i].k.codes.quantized}
    return tuple(
        replace(f, k=replace(f.k, transform=Transform.AFFINE_HADAMARD)) if i in chosen else f
        for i, f in enumerate(formats)
    )


def calibrated_tensors(
    layers: Iterable[int], sums_L3HD: Tensor, tokens: int, specs: Sequence[AttentionSpec]
) -> dict[str, Tensor]:
    """Return the shifts and scales of these layers' keys by the names that a policy gives them."""
    tensors: dict[str, Tensor] = {}
    for i in layers:
        shift_HD, scale_HD = key_transform(sums_L3HD[i], tokens, shift=specs[i].softcap is None)
        tensors[f"{i}.k.scale"] = scale_HD
        if shift_HD is not None:
            tensors[f"{i}.k.shift"] = shift_HD
    return tensors
