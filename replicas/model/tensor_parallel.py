"""Which part of every parameter a tensor-parallel shard holds, and the collectives between the shards.

A shard is a smaller model: built from `shard_config`, transformers' own code computes with the shard's heads
and its share of the MLP. The style of each module comes from the config's `base_model_tp_plan`; a parameter
is split along that style's dimension into pieces of the shard's size, and rank r of tp takes piece
r * pieces // tp, which gives kv heads to several ranks where there are fewer of them than ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quire.replicas.errors import ConfigError, ModelNotServable

_COLUMN = frozenset({"colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"})
_ROW = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
_REDUCED = frozenset({"moe_tp_experts"})
_MLP_SIZES = {
    "intermediate_size": "mlp.",
    "moe_intermediate_size": "mlp.experts.",
    "shared_expert_intermediate_size": "mlp.shared_expert.",
}
"""Sizes in a config, and the modules that have them: divided where the plan divides those."""


class Collectives(Protocol):
    """The collective operations that a sharded model needs of its group."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather every rank's `x`: [ranks, *x.shape]."""


def shard_config(config: PreTrainedConfig, tp: int) -> PreTrainedConfig:
    """Return the configuration of the smaller model of one of `tp` shards.

    Raises: ConfigError where the heads or the MLP cannot be divided, ModelNotServable where transformers has
    no tensor-parallel plan for the model.
    """
    shard = copy.deepcopy(config)
    shard.use_cache = False
    if tp == 1:
        return shard
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if config.base_model_tp_plan is None or kv_heads is None:
        raise ModelNotServable(
            f"transformers has no tensor-parallel plan for {config.model_type} models; set tp to 1"
        )
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        fits = [n for n in range(1, heads + 1) if not heads % n and (not kv_heads % n or not n % kv_heads)]
        raise ConfigError(
            f"tp={tp} does not fit {heads} query heads and {kv_heads} kv heads; "
            f"possible are {', '.join(map(str, fits))}"
        )
    shard.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shard.num_attention_heads = heads // tp
    shard.num_key_value_heads = max(kv_heads // tp, 1)
    for name, module in _MLP_SIZES.items():
        size = getattr(config, name, None)
        if size is None or not any(module in pattern for pattern in config.base_model_tp_plan):
            continue
        if not isinstance(size, int) or size % tp:
            raise ConfigError(f"tp={tp} does not divide the model's {name} ({size}); choose a tp that does")
        setattr(shard, name, size // tp)
    return shard


def fused_sizes(module: str, config: PreTrainedConfig, size: int) -> tuple[int, ...]:
    """Return the sizes of the projections that a module of `size` outputs fuses, or its own size."""
    leaf = module.rpartition(".")[2]
    if leaf == "qkv_proj":
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return (
            config.num_attention_heads * d,
            config.num_key_value_heads * d,
            config.num_key_value_heads * d,
        )
    if leaf == "gate_up_proj":
        return (size // 2,) * 2
    return (size,)


@dataclass(frozen=True)
class ShardPlan:
    """The style of every module and parameter, by name."""

    styles: tuple[tuple[re.Pattern[str], str], ...]
    config: PreTrainedConfig
    """Of the whole model."""
    shard: PreTrainedConfig
    rank: int
    tp: int

    @staticmethod
    def of(model: PreTrainedModel, config: PreTrainedConfig, rank: int, tp: int) -> ShardPlan:
        """Plan for `model`, which was built from the shard's config."""
        styles = {f"{model.base_model_prefix}.{k}": v for k, v in (config.base_model_tp_plan or {}).items()}
        styles[output_head(model)[0]] = "colwise"
        patterns = ((re.compile(re.escape(k).replace(r"\*", r"\d+")), v) for k, v in styles.items())
        return ShardPlan(tuple(patterns), config, model.config, rank, tp)

    def style(self, name: str) -> str | None:
        return next((style for pattern, style in self.styles if pattern.fullmatch(name)), None)

    def module_of(self, parameter: str) -> str:
        """Return a parameter's name in the plan: its module's, or its own (experts have bare ones)."""
        return parameter if self.style(parameter) else parameter.rpartition(".")[0]

    def ranges(
        self, parameter: str, whole: Sequence[int], local: Sequence[int]
    ) -> tuple[int, tuple[slice, ...]]:
        """Return the dimension along which `parameter` is split, and the ranges of `whole` that make `local`.

        Raises: ModelNotServable where the shapes fit no split.
        """
        name = self.module_of(parameter)
        style = self.style(name) or "none"
        summed = style in _ROW and self.tp > 1 and len(local) > 1
        if tuple(whole) == tuple(local) and not summed:
            return 0, (slice(0, local[0]),)
        dim = len(local) - (1 if style in _ROW or len(local) == 1 else 2)
        sizes = fused_sizes(name, self.config, whole[dim])
        local_sizes = fused_sizes(name, self.shard, local[dim])
        fits = style in _COLUMN | _ROW and len(whole) == len(local)
        fits = fits and all(w == n for i, (w, n) in enumerate(zip(whole, local, strict=True)) if i != dim)
        fits = fits and (sum(sizes), sum(local_sizes)) == (whole[dim], local[dim])
        # An all-reduce must count every part once.
        fits = fits and not (summed and whole[dim] != local[dim] * self.tp)
        if not fits or not all(_divides(w, n, self.tp) for w, n in zip(sizes, local_sizes, strict=True)):
            raise ModelNotServable(
                f"{parameter} has shape {tuple(whole)} in the checkpoint and {tuple(local)} on one of "
                f"{self.tp} shards, which its tensor-parallel style ({style}) does not explain; set tp to 1"
            )
        ranges, at = [], 0
        for size, part in zip(sizes, local_sizes, strict=True):
            start = at + self.rank * (size // part) // self.tp * part
            ranges.append(slice(start, start + part))
            at += size
        return dim, tuple(ranges)

    def bias_on_rank0_only(self, parameter: str) -> bool:
        """Tell whether this bias is added to an output that is all-reduced: only rank 0 may add it."""
        return parameter.endswith(".bias") and self.style(self.module_of(parameter)) in _ROW


def _divides(whole: int, local: int, tp: int) -> bool:
    """Tell whether `whole` splits into pieces of `local` that `tp` ranks share evenly."""
    pieces = whole // local
    return whole % local == 0 and pieces <= tp and tp % pieces == 0


def output_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the name and layer that computes logits. Raises ModelNotServable where there is none."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise ModelNotServable(f"{type(model).__name__} has no linear output head; it is not servable")
    return next(name for name, module in model.named_modules() if module is head), head


def shrink_head(model: PreTrainedModel, tp: int) -> None:
    """Give the output head of a shard's meta model its share of the vocabulary, if that divides."""
    _, head = output_head(model)
    if head.out_features % tp == 0:
        head.out_features //= tp
        head.weight = nn.Parameter(torch.empty(head.out_features, head.in_features, device="meta"), False)
        if head.bias is not None:
            head.bias = nn.Parameter(torch.empty(head.out_features, device="meta"), False)


def add_collectives(model: PreTrainedModel, plan: ShardPlan, group: Collectives) -> None:
    """Add an all-reduce after every row-wise module, and an all-gather of logits after the output head."""
    for name, module in model.named_modules():
        style = plan.style(name)
        if style in _REDUCED or (style in _ROW and isinstance(module, nn.Linear)):
            module.register_forward_hook(partial(_all_reduced, group))
    _, head = output_head(model)
    if head.out_features < plan.config.vocab_size:
        head.register_forward_hook(partial(_gathered, group))


def _all_reduced(group: Collectives, module: nn.Module, args: object, out: Tensor) -> Tensor:
    return group.all_reduce(out)


def _gathered(group: Collectives, module: nn.Module, args: object, out_1RV: Tensor) -> Tensor:
    """Gather [1, R, vocabulary of a shard] to [1, R, vocabulary]."""
    return group.all_gather(out_1RV).movedim(0, -2).flatten(-2)
