"""A checkpoint's tensors by the names and in the shapes of the model's parameters.

Checkpoints name, split and stack their tensors in other ways than the model's code does. What belongs where
is transformers' knowledge: its own conversions say it here, as they do in `from_pretrained`.
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
from quire.replicas.model.meta import meta_model
from quire.replicas.model.unread import Index, Unread

_LOG = logging.getLogger(__name__)

_SHOWN = 3
"""Names that a message gives of many."""


@dataclass(frozen=True)
class NamedWeights:
    """A source of weights: every parameter of the model, or of a tied pair at least one. A context."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Unread]

    @staticmethod
    def open(folder: Path, config: PreTrainedConfig) -> NamedWeights:
        """Raises ModelNotServable where the folder does not hold the model that the config describes."""
        model = meta_model(copy.deepcopy(config))
        with ExitStack() as unless_right:
            named = getattr(config, "transformers_weights", None)
            checkpoint = unless_right.enter_context(Checkpoint.open(folder, named))
            tensors, unused = _converted(checkpoint, model)
            _check(folder, tensors, model)
            unless_right.pop_all()
        _tell_unused(folder, unused, model)
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
        """The part at `index`; only this much is read of what the checkpoint stacks or splits."""
        shape = self.shape(name)
        full = (*index, *(slice(None),) * (len(shape) - len(index)))
        return self.tensors[name].read(
            tuple(slice(*one.indices(n)[:2]) for one, n in zip(full, shape, strict=True))
        )


def _converted(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, Unread], list[str]]:
    """The model's tensors, and the checkpoint's names that belong to none.

    The same walk as in transformers' `convert_and_load_state_dict_in_model`, which loads whole tensors.
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
        groups[target].add_tensor(target, name, pattern or name, _unread(checkpoint, name))
    tensors: dict[str, Unread] = {}
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


def _unread(checkpoint: Checkpoint, name: str) -> Unread:
    def read(index: Index) -> Tensor:
        return checkpoint.read(name, index)

    return Unread.of(checkpoint.shape(name), checkpoint.dtype(name), read)


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


def _tell_unused(folder: Path, names: Iterable[str], model: PreTrainedModel) -> None:
    """Say which tensors the model does not use, but for those that its class expects to be there."""
    known = {
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        *(model._keys_to_ignore_on_load_unexpected or ()),
    }
    unused = [name for name in names if not any(re.search(pattern, name) for pattern in known)]
    if unused:
        _LOG.warning("%s has no use for the tensors %s in %s", type(model).__name__, _some(unused), folder)


def _some(names: Iterable[str]) -> str:
    shown = sorted(names, key=dot_natural_key)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
