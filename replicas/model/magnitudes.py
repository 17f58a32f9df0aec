"""Static scales for keys and values whose magnitude is outside their KV format's range.

V times c, with the output projection divided by c, is the same model; so is K times c with Q divided by c.
How large a model's K and V are is therefore arbitrary, while formats and fp16 arithmetic have a range. Both
are measured when the model is loaded, by one forward of a short, fixed prompt. A head outside its format's
range gets a power of two as its static scale, which is exact; the others get none.

Names: L layers, H kv heads of a shard or of the whole model, D head_dim, T tokens, Q query heads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quire.kernels.cache_view import AttentionSpec
from quire.kernels.formats import KVFormat, LayerFormat, Scales
from quire.kernels.ref.paged import attend_numbers
from quire.kernels.transform import LayerTransform, SideTransform
from quire.replicas.model.attention import layer_index
from quire.replicas.model.tensor_parallel import Collectives

_LOG = logging.getLogger(__name__)

PROMPT_TOKENS = 64
"""Length of the measured prompt; fewer where the model takes fewer."""

_RANGE = {Scales.STATIC: 4, Scales.TOKEN: 6}
"""A format suits numbers whose root mean square (rms) is between 2**-n and 2**n.

Static codes are e4m3, whose steps stop shrinking at 2**-6 and whose numbers end at 448: an rms of 2**-4 costs
1 % of the precision (2**-6 would cost 45 %), one of 2**4 leaves outliers a factor of 28. Dynamic scales are
fp16 and about a 45th (int8) or a third (int4) of the rms. At 2**-6 a token may be 2**8 times quieter before
its scale is coarse; at 2**6 one may be 2**5 times louder before a GPU's fp16 product of probability and scale
overflows.
"""

_STEP = 4
"""Exponents are multiples of it: coarse, so that rounding differences between GPUs, types and numbers of
shards rarely change one. Where they do, the two replicas' block keys differ, and they share no blocks.
"""


class MagnitudeProbe:
    """A step of one sequence without pages, which records the mean square of each kv head's K and V."""

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}
        """Layer → fp64 [2, H]."""

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self.squares[layer_index(module)] = torch.stack(
            [x_THD.double().square().mean((0, 2)) for x_THD in (k_THD, v_THD)]
        )
        return attend_numbers(q_TQD.float(), k_THD.float(), v_THD.float(), spec).to(q_TQD.dtype)


def fixed_prompt(vocab_size: int, tokens: int) -> list[int]:
    """Token ids from all of the vocabulary, the same for every model of that size."""
    return [(i * 0x9E3779B1 % 2**32) * vocab_size >> 32 for i in range(1, tokens + 1)]


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, tokens: int = PROMPT_TOKENS) -> Tensor:
    """Measure the mean squares of K and V of this shard's kv heads: fp64 [L, 2, H] on the CPU.

    The prompt covers the vocabulary. All ranks of a replica call it at the same time.
    """
    ids_1T = torch.tensor([fixed_prompt(model.config.vocab_size, tokens)], device=model.device)
    positions_1T = torch.arange(tokens, device=model.device)[None]
    probe = MagnitudeProbe()
    model(
        input_ids=ids_1T,
        position_ids=positions_1T,
        use_cache=False,
        step=probe,
        logits_to_keep=positions_1T[0, -1:],
    )
    return torch.stack([probe.squares[layer] for layer in sorted(probe.squares)]).cpu()


def gather_heads(x_LMH: Tensor, kv_heads: int, group: Collectives | None) -> Tensor:
    """[L, M, kv_heads, ...], the same on all ranks, from each rank's own heads.

    Of a head that several ranks hold, each with some of its query heads, the mean.
    """
    if group is None:
        return x_LMH
    ranks_LMH = group.all_gather(x_LMH).movedim(0, 2).flatten(2, 3)
    heads_LMH: Tensor = ranks_LMH.unflatten(2, (kv_heads, -1)).mean(3)
    return heads_LMH


def static_exponent(mean_square: float, fmt: KVFormat) -> int:
    """Return log2 of a head's static scale: 0 within the format's range, or if not finite."""
    if fmt.scales is Scales.NONE or not 0 < mean_square < math.inf:
        return 0
    log2 = math.log2(mean_square) / 2
    return 0 if abs(log2) <= _RANGE[fmt.scales] else _STEP * round(log2 / _STEP)


def measured_transforms(
    model: PreTrainedModel,
    formats: Sequence[LayerFormat],
    defaults: Sequence[LayerTransform],
    *,
    kv_heads: int,
    head_dim: int,
    group: Collectives | None,
    max_tokens: int,
) -> tuple[LayerTransform, ...]:
    """Every layer's maps for the whole model's kv heads, on the CPU: `defaults`, scaled where that is needed.

    The same on all ranks, which call it at the same time. Calibrated scales stay as they are.
    """
    if all(scales is Scales.NONE for f in formats for scales in (f.k.scales, f.v.scales)):
        return tuple(defaults)
    squares_L2H = gather_heads(mean_squares(model, min(max_tokens, PROMPT_TOKENS)), kv_heads, group)
    _warn_non_finite(squares_L2H)
    return tuple(
        LayerTransform(
            _scaled(default.k, fmt.k, k_H, head_dim),
            _scaled(default.v, fmt.v, v_H, head_dim),
        )
        for default, fmt, (k_H, v_H) in zip(defaults, formats, squares_L2H.tolist(), strict=True)
    )


def _scaled(default: SideTransform, fmt: KVFormat, square_H: Sequence[float], head_dim: int) -> SideTransform:
    exponent_H = [static_exponent(square, fmt) for square in square_H]
    if default.scale_HD is not None or not any(exponent_H):
        return default
    scale_H = torch.tensor(exponent_H, dtype=torch.float32).exp2()
    return replace(default, scale_HD=scale_H[:, None].repeat(1, head_dim))


def _warn_non_finite(squares_L2H: Tensor) -> None:
    if layers := (~squares_L2H.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
        _LOG.warning(
            "keys or values of layers %s are not finite for a test prompt: the weights are damaged, or too "
            "large for the type they are computed in (set dtype to bfloat16 or float32)",
            _listed(layers),
        )


def log_scales(formats: Sequence[LayerFormat], transforms: Sequence[LayerTransform]) -> None:
    """Log which layers are stored divided, and that static scales have no calibration."""
    for name in ("k", "v"):
        sides = [(getattr(f, name), getattr(t, name)) for f, t in zip(formats, transforms, strict=True)]
        scale_LH = {
            i: transform.scale_HD[:, 0]
            for i, (fmt, transform) in enumerate(sides)
            if transform.scale_HD is not None and not fmt.transform.affine
        }
        if scale_LH:
            exponents = torch.stack(list(scale_LH.values())).log2()
            _LOG.info(
                "%s of layers %s is stored divided by 2^%d to 2^%d: it is outside its format's range",
                name.upper(),
                _listed(scale_LH),
                exponents.min(),
                exponents.max(),
            )
    if static := sorted({s.codes.value for f in formats for s in (f.k, f.v) if s.scales is Scales.STATIC}):
        _LOG.warning(
            "%s is stored without a calibration: a head's scale is 1, or a power of two where its magnitude "
            "for a test prompt requires it",
            "/".join(static),
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
