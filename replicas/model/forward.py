"""One forward pass of a shard's model over a step."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quire.replicas.model.compiled import OpaqueAttention, compile_layers
from quire.replicas.model.merged import release_products
from quire.replicas.model.step import ModelInputs


class ForwardPass:
    """Calls the model, compiled or eager."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool) -> None:
        self.model = model
        self._opaque = OpaqueAttention() if compiled else None
        if compiled:
            compile_layers(model)

    @torch.inference_mode()
    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Compute fp32 logits [R, vocabulary] of `logit_rows_R`; the step's K and V are written to pages."""
        positions_T = inputs.positions_T
        if self._opaque:  # a copy, because torch would compile again for every storage offset
            positions_T = positions_T.clone()
        with self._opaque.bound(inputs.step) if self._opaque else nullcontext(inputs.step) as step:
            logits_1RV: Tensor = self.model(
                input_ids=inputs.token_ids_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                step=step,
                logits_to_keep=inputs.logit_rows_R,
            ).logits
        return logits_1RV[0].float()

    def close(self) -> None:
        """Free the weights at once, even of compiled modules, which refer to themselves."""
        release_products(self.model)
        for module in self.model.modules():
            module._parameters.clear()
            module._buffers.clear()
