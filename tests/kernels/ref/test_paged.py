import torch

from quire.kernels.cache_view import AttentionSpec
from quire.kernels.ref.paged import attend_numbers


def test_a_padding_row_that_sees_nothing_is_a_row_of_zeros():
    """As a captured graph has them for the sequences that a step lacks."""
    nothing_0HD = torch.zeros(0, 2, 8)
    out_TQD = attend_numbers(torch.ones(1, 4, 8), nothing_0HD, nothing_0HD, AttentionSpec(1.0))
    assert torch.equal(out_TQD, torch.zeros(1, 4, 8))
