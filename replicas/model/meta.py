"""Builds transformers' models on the meta device: names and shapes without numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.checkpoint import UNREADABLE


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device. Raises ModelNotServable where transformers cannot build it."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except UNREADABLE as error:
        raise ModelNotServable(
            f"transformers cannot build {model_class.__name__} with our attention: {error}"
        ) from error
    return model
