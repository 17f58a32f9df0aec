"""What closing gives back on a GPU, with compiled layers and captured graphs."""

import gc

import pytest
import torch

from quire.replicas import LLM, PoolConfig, SamplingParams
from quire.replicas.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POOL_BYTES = 1 << 30
"""That shows among everything else."""


@pytest.fixture(autouse=True)
def _without_collection():
    gc.collect()
    torch.cuda.empty_cache()
    gc.disable()
    yield
    gc.enable()


def test_closing_frees_weights_and_pages_at_once():
    LLM("demo", pool=PoolConfig(bytes=POOL_BYTES)).close()  # what a first one leaves stays
    before = torch.cuda.memory_allocated()
    with LLM("demo", pool=PoolConfig(bytes=POOL_BYTES)) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=20, ignore_eos=True))
        assert torch.cuda.memory_allocated() - before > POOL_BYTES
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_a_load_that_fails_half_way_leaves_nothing():
    with pytest.raises(ConfigError, match=r"pool\.bytes"):
        LLM("demo", pool=PoolConfig(bytes=1 << 50))
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        try:
            LLM("demo", pool=PoolConfig(bytes=1 << 50))
        except ConfigError as error:
            error.__traceback__ = None  # whose frames hold what was there
    assert torch.cuda.memory_allocated() - before < 1 << 20
