"""A checkpoint's tensors by the names and in the shapes of the model's parameters.

Checkpoints may name, split and stack tensors differently from the model's code. transformers' own conversions
translate them, as in `from_pretrained`.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.checkpoint import Checkpoint
from quire.replicas.model.lazy_tensor import Index, LazyTensor
from quire.replicas.model.meta import meta_model

_LOG = logging.getLogger(__name__)

_SHOWN = 3
"""The most names in a message."""


@dataclass(frozen=True)
class NamedWeights:
    """All parameters of the model, of a tied pair at least one. A context manager."""

    checkpoint: Checkpoint
    tensors: Mapping[str, LazyTensor]

    @staticmethod
    def open(folder: Path, config: PreTrainedConfig) -> NamedWeights:
        """Open a checkpoint. Raises ModelNotServable where it is not the model that the config describes."""
        model = meta_model(copy.deepcopy(config))
        with ExitStack() as on_error:
            named = getattr(config, "transformers_weights", None)
            checkpoint = on_error.enter_context(Checkpoint.open(folder, named))
            tensors, unused = _converted(checkpoint, model)
            _check(folder, tensors, model)
            on_error.pop_all()
        _warn_unused(folder, unused, model)
        return NamedWeights(checkpoint, tensors)

    def __enter__(self) -> NamedWeights:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.checkpoint.files.close()

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def fingerprint(self) -> bytes:
        return self.checkpoint.fingerprint

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read the part at `index`, and no more of what the checkpoint stacks or splits."""
        shape = self.shape(name)
        full = (*index, *(slice(None),) * (len(shape) - len(index)))
        return self.tensors[name].read(
            tuple(slice(*one.indices(n)[:2]) for one, n in zip(full, shape, strict=True))
        )


def _converted(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the model's tensors, and the checkpoint's names that belong to none.

    It follows transformers' `convert_and_load_state_dict_in_model`, which loads whole tensors.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, Any] = {}
    unused = []
    for name in sorted(checkpoint.slices, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            unused.append(name)
            continue
        if target not in groups:
            groups[target] = (
                WeightRenaming(name, target) if pattern is None else copy.deepcopy(by_pattern[pattern])
            )
        groups[target].add_tensor(target, name, pattern or name, _lazy(checkpoint, name))
    tensors: dict[str, LazyTensor] = {}
    for target, group in groups.items():
        try:
            made = group.convert(target, model=model, config=model.config)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ModelNotServable(
                f"the tensors in {checkpoint.folder} from which {target} is made do not fit its config.json: "
                f"{error}"
            ) from error
        tensors |= {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
    return {name: t for name, t in tensors.items() if name in state}, unused


def _lazy(checkpoint: Checkpoint, name: str) -> LazyTensor:
    def read(index: Index) -> Tensor:
        return checkpoint.read(name, index)

    return LazyTensor.of(checkpoint.shape(name), checkpoint.dtype(name), read)


def _check(folder: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    state = model.state_dict()
    missing = set(state) - set(tensors)
    for target, source in model.all_tied_weights_keys.items():
        if target in tensors or source in tensors:
            missing -= {target, source}
    if missing:
        raise ModelNotServable(
            f"the checkpoint in {folder} has no tensor {_some(missing)}; its weights do not belong to its "
            "config.json, or it names them in a way this version of transformers does not know"
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ModelNotServable(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(state[name].shape)} by "
                f"{folder / 'config.json'}; the weights do not belong to this config.json"
            )


def _warn_unused(folder: Path, names: Iterable[str], model: PreTrainedModel) -> None:
    """Warn of tensors that the model does not use, except those that its class ignores."""
    known = {
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        *(model._keys_to_ignore_on_load_unexpected or ()),
    }
    unused = [name for name in names if not any(re.search(pattern, name) for pattern in known)]
    if unused:
        _LOG.warning("%s does not use the tensors %s in %s", type(model).__name__, _some(unused), folder)


def _some(names: Iterable[str]) -> str:
    shown = sorted(names, key=dot_natural_key)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
