"""Which static transform each layer's K and V get: a calibrated one, one for biased keys, one for magnitudes.

All ranks of a replica come to the same, for the whole model's heads; it is part of every block key.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor
from transformers import PreTrainedModel

from quire.kernels.formats import KVFormat, LayerFormat, Transform
from quire.kernels.transform import LayerTransform, SideTransform, default_transform
from quire.replicas.model.calibration import calibrated_tensors, key_moments
from quire.replicas.model.loading import LoadedModel
from quire.replicas.model.magnitudes import fixed_prompt, gather_heads, log_scales, measured_transforms
from quire.replicas.model.policy import KVPolicy
from quire.replicas.model.tensor_parallel import Collectives

_LOG = logging.getLogger(__name__)

_PROMPT_TOKENS = 512
"""Of the fixed prompt that biased keys are calibrated on; fewer where the model takes fewer."""


def whole_key_moments(
    model: PreTrainedModel, token_ids: Sequence[int], kv_heads: int, group: Collectives | None
) -> Tensor:
    """Return `key_moments` of all kv heads, fp64 [L, 3, kv_heads, D] on the CPU. A call of all ranks."""
    return gather_heads(key_moments(model, token_ids), kv_heads, group).cpu()


def static_transforms(
    loaded: LoadedModel,
    policy: KVPolicy,
    formats: Sequence[LayerFormat],
    biased: AbstractSet[int],
    *,
    kv_heads: int,
    weights: str,
    group: Collectives | None,
    max_tokens: int,
) -> tuple[LayerTransform, ...]:
    """Return every layer's transforms for the whole model's kv heads, on the CPU.

    All ranks call it at the same time. `formats`: the policy's, with affine keys on the `biased` layers.
    Raises ConfigError for a policy that was made for another model.
    """
    head_dim = loaded.layers[0].k_dim
    policy.check(kv_heads, head_dim, weights)
    tensors = dict(policy.tensors)
    if biased:
        prompt = fixed_prompt(loaded.model.config.vocab_size, min(_PROMPT_TOKENS, max_tokens))
        sums_L3HD = whole_key_moments(loaded.model, prompt, kv_heads, group)
        specs = [layer.spec for layer in loaded.layers]
        tensors |= calibrated_tensors(biased, sums_L3HD, len(prompt), specs)
    defaults = [
        LayerTransform(_side(f.k, f"{i}.k", tensors), _side(f.v, f"{i}.v", tensors))
        for i, f in enumerate(formats)
    ]
    return measured_transforms(
        loaded.model,
        formats,
        defaults,
        kv_heads=kv_heads,
        head_dim=head_dim,
        group=group,
        max_tokens=max_tokens,
    )


def log_choices(
    formats: Sequence[LayerFormat], transforms: Sequence[LayerTransform], biased: AbstractSet[int]
) -> None:
    """Log which layers got a static transform, and why."""
    if biased:
        _LOG.warning(
            "keys of layers %s have a large constant part (a bias), which their format would not resolve; "
            "shifts and scales from a fixed prompt do. `quire calibrate` finds better ones on your texts",
            ", ".join(map(str, sorted(biased))),
        )
    log_scales(formats, transforms)


def _side(fmt: KVFormat, name: str, tensors: dict[str, Tensor]) -> SideTransform:
    scale_HD = tensors.get(f"{name}.scale")
    if scale_HD is None or not fmt.transform.affine:
        return default_transform(fmt)
    rotated = fmt.transform is Transform.AFFINE_HADAMARD
    return SideTransform(rotated, tensors.get(f"{name}.shift"), scale_HD)
