"""A step as attention reads it: the batch's arrays on the device, in parts for one kernel each.

Names: T tokens, Q query heads, H kv heads, D head_dim, S sequences, R rows whose logits are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.decode import decode_attention
from quire.kernels.decode_plan import DecodeKind, DecodePlan, decode_kind, plan_items
from quire.kernels.prefill import prefill_attention
from quire.kernels.write import write_kv, write_step
from quire.replicas.model.attention import LayerHeads, layer_index
from quire.replicas.staging import Array, stage_groups
from quire.replicas.step_batch import Ints, StepBatch

_DECODE_TOKENS = 8
"""Sequences with at most this many new tokens are served by the decode kernel."""

_CHUNK_TOKENS = 512
"""A chunk of at least this many tokens is a part of its own, which prefill may serve faster."""


@dataclass(frozen=True, eq=False)
class StepPart:
    """Consecutive sequences of a step that one kernel serves."""

    rows: slice
    """The tokens of these sequences."""
    batch: PagedBatch
    decode: bool
    plans: tuple[DecodePlan | None, ...] = ()
    """For every layer, the work items of a GPU's decode kernel."""


@dataclass(frozen=True, eq=False)
class PagedStep:
    """One step over the pages of a shard."""

    caches: tuple[LayerCache, ...]
    parts: tuple[StepPart, ...]
    """The first may hold decoding sequences, the others hold prefill chunks."""
    slots_T: Tensor

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Call `attend_layer` for the layer of `module`."""
        return self.attend_layer(layer_index(module), q_TQD, k_THD, v_THD, spec)

    def attend_layer(
        self, layer: int, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Write the new tokens' K and V, then attend to them too. Rows of no sequence are undefined."""
        cache = self.caches[layer]
        first, *others = self.parts
        if first.decode:
            queries = write_step(cache, q_TQD[first.rows], k_THD, v_THD, self.slots_T)
            plan = first.plans[layer]
            outs = [
                decode_attention(cache, queries, first.batch, spec, plan, transformed=True, dtype=q_TQD.dtype)
            ]
        else:
            write_kv(cache, k_THD, v_THD, self.slots_T)
            outs = [prefill_attention(cache, q_TQD[first.rows], first.batch, spec)]
        outs += [prefill_attention(cache, q_TQD[part.rows], part.batch, spec) for part in others]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The arguments of a forward pass."""

    token_ids_T: Tensor
    positions_T: Tensor
    step: PagedStep
    logit_rows_R: Tensor


class StepBuilder:
    """Turns batches into steps over one pool."""

    def __init__(
        self, caches: tuple[LayerCache, ...], layers: Sequence[LayerHeads], device: torch.device
    ) -> None:
        self.caches, self.device = caches, device
        self._layers = layers
        self._kinds: dict[int, tuple[DecodeKind, ...]] = {}

    def build(
        self, batch: StepBatch, drawn: Tensor | None = None, *, tokens: int = 0, rows: int = 0
    ) -> ModelInputs:
        """Move a batch, sorted by new tokens, to the device, padded to `tokens` and `rows`.

        Padding tokens belong to no sequence, are stored nowhere, and go to the last part.
        `drawn`: the tokens to which the batch's negative token ids refer.
        """
        tokens = max(tokens, len(batch.token_ids_T))
        arrays: dict[str, Array] = {
            "token_ids": _padded(batch.token_ids_T, tokens),
            "positions": _padded(batch.positions_T, tokens),
            "slots": _padded(batch.slots_T, tokens, -1),
            "rows": _padded(batch.logit_rows_R, rows),
        }
        cuts = tuple(_cut(batch, tokens, self.device))
        kinds = [self.kinds(cut.new_tokens) if cut.decode else () for cut in cuts]
        of_parts = [
            _part_arrays(batch, cut) | plan_arrays(kinds_of_cut, *cut.lengths(batch))
            for cut, kinds_of_cut in zip(cuts, kinds, strict=True)
        ]
        staged, *staged_parts = stage_groups([arrays, *of_parts], self.device)
        parts = []
        for cut, kinds_of_cut, part in zip(cuts, kinds, staged_parts, strict=True):
            paged = PagedBatch(
                query_start_S1=part["query_start"],
                kv_tokens_S=part["kv_tokens"],
                page_table_SM=part["page_table"],
                slots_T=staged["slots"][cut.rows],
                max_query_tokens=cut.new_tokens,
                max_kv_tokens=int(batch.kv_tokens_S[cut.sequences].max()),
            )
            plans = layer_plans(kinds_of_cut, part, len(self.caches))
            parts.append(StepPart(cut.rows, paged, cut.decode, plans))
        return ModelInputs(
            known_tokens(staged["token_ids"], drawn),
            staged["positions"],
            PagedStep(self.caches, tuple(parts), staged["slots"]),
            staged["rows"],
        )

    def close(self) -> None:
        """Release the pool."""
        self.caches = ()

    def kinds(self, new_tokens: int) -> tuple[DecodeKind, ...]:
        """Return every layer's kind for up to `new_tokens` a sequence; empty where nothing is planned."""
        if self.device.type != "cuda":
            return ()
        if new_tokens not in self._kinds:
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._kinds[new_tokens] = tuple(
                decode_kind(cache, heads.query_heads, heads.spec, new_tokens, multiprocessors)
                for cache, heads in zip(self.caches, self._layers, strict=True)
            )
        return self._kinds[new_tokens]


def known_tokens(token_ids_T: Tensor, drawn: Tensor | None) -> Tensor:
    """Replace negative token ids by the tokens that the previous step drew."""
    if drawn is None:
        return token_ids_T
    return torch.where(token_ids_T < 0, drawn[(-1 - token_ids_T).clamp(min=0)], token_ids_T)


def plan_arrays(
    kinds: Sequence[DecodeKind],
    new_S: Ints,
    kv_tokens_S: Ints,
    capacities: Mapping[DecodeKind, int] | None = None,
) -> dict[str, Array]:
    """Plan decode attention for all kinds, as arrays to stage, padded to `capacities`."""
    arrays: dict[str, Array] = {}
    for i, kind in enumerate(dict.fromkeys(kinds)):
        plan = plan_items(kind, new_S, kv_tokens_S, capacities[kind] if capacities else None)
        arrays[f"items of kind {i}"] = plan.items_W4.numpy()
        arrays[f"first items of kind {i}"] = plan.first_item_S1.numpy()
    return arrays


def layer_plans(
    kinds: Sequence[DecodeKind], staged: Mapping[str, Tensor], layers: int
) -> tuple[DecodePlan | None, ...]:
    """Return each layer's plan from the staged arrays of `plan_arrays`."""
    plans = {
        kind: DecodePlan(staged[f"items of kind {i}"], staged[f"first items of kind {i}"])
        for i, kind in enumerate(dict.fromkeys(kinds))
    }
    return tuple(plans[kind] for kind in kinds) or (None,) * layers


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a part begins and ends."""

    sequences: slice
    rows: slice
    new_tokens: int
    """The most new tokens of any of its sequences."""
    decode: bool

    def lengths(self, batch: StepBatch) -> tuple[Ints, Ints]:
        """Return the new tokens and all tokens of each of its sequences."""
        return np.diff(batch.query_start_S1)[self.sequences], batch.kv_tokens_S[self.sequences]


def _cut(batch: StepBatch, tokens: int, device: torch.device) -> Iterator[_Cut]:
    """Separate decoding sequences, short chunks and each long chunk; a CPU serves all in one part."""
    new_S = np.diff(batch.query_start_S1)
    count = len(new_S)
    decode_end, short_end = np.searchsorted(new_S, [_DECODE_TOKENS + 1, _CHUNK_TOKENS]).tolist()
    ends = [decode_end, *range(max(short_end, 1), count), count] if device.type != "cpu" else [count]
    first = 0
    for end in dict.fromkeys(ends):
        if end > first:
            start, stop = int(batch.query_start_S1[first]), int(batch.query_start_S1[end])
            rows = slice(start, stop if end < count else tokens)
            decode = end <= decode_end or device.type == "cpu"
            yield _Cut(slice(first, end), rows, int(new_S[first:end].max()), decode)
        first = end


def _part_arrays(batch: StepBatch, cut: _Cut) -> dict[str, Array]:
    starts = batch.query_start_S1[cut.sequences.start : cut.sequences.stop + 1]
    arrays = {
        "query_start": starts - starts[0],
        "kv_tokens": batch.kv_tokens_S[cut.sequences],
        "page_table": batch.page_table_SM[cut.sequences],
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def _padded(numbers: Ints, length: int, value: int = 0) -> Ints:
    more = max(length - len(numbers), 0)
    return np.pad(numbers, (0, more), constant_values=value) if more else numbers
