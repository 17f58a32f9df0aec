"""A compiled model computes what transformers wrote, over any number of tokens, without compiling anew."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Chunk, make_model, reference_logits, some_tokens, step_of, tiny_config

from quire.replicas.model.forward import ForwardPass
from quire.replicas.runner.shard import Shard


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # one of them with windows and soft-caps
def test_compiled_code_serves_every_step_of_a_model(name, tmp_path):
    folder, ids = make_model(name, tmp_path), some_tokens(90)
    shard = Shard(tiny_config(folder))
    forward = ForwardPass(_plain(shard), compiled=True)
    outs, start, codes = [], 0, []
    for tokens in (40, 2, 31, 17):
        step = step_of([Chunk(ids[start : start + tokens], start, range(3, 9))], 16)
        outs.append(forward(shard._builder.build(step)))
        codes.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        start += tokens
    torch.testing.assert_close(torch.cat(outs), reference_logits(folder, ids), atol=1e-4, rtol=0)
    assert codes[0] == codes[-1] > 0


def _plain(shard: Shard) -> torch.nn.Module:
    """The model without what makes a CPU's arithmetic invariant, which depends on the number of tokens."""
    model = shard._forward.model
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if type(child).__name__ == "ChunkedActivation":
                setattr(module, child_name, child.activation)
    return model
