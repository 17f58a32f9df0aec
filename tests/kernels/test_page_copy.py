"""Gather, scatter and checksum: the kernels in the interpreter, and the CPU's own code."""

from __future__ import annotations

import pytest
import torch

from quire.kernels import cpu
from quire.kernels.page_copy import (
    checksum_pages,
    gather_pages,
    launch_checksum,
    launch_copy,
    scatter_pages,
)

PAGE_BYTES = 3 * 4096 + 128


def random_pages(pages: int, page_bytes: int = PAGE_BYTES) -> torch.Tensor:
    torch.manual_seed(pages)
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_scattering_what_was_gathered_restores_the_pages(index_type):
    pool, pages = random_pages(7), torch.tensor([5, 0, 3], dtype=index_type)
    packed = gather_pages(pool, pages)
    assert torch.equal(packed, pool[pages.long()])
    other = torch.zeros_like(pool)
    scatter_pages(other, pages, packed)
    assert torch.equal(other[pages.long()], packed)
    assert not other[[1, 2, 4, 6]].any()


@pytest.mark.parametrize("page_bytes", [128, 8192, PAGE_BYTES])
def test_the_copy_kernel_moves_every_byte_both_ways(page_bytes):
    pool, pages = random_pages(6, page_bytes), torch.tensor([4, 1, 5], dtype=torch.int32)
    packed = torch.zeros(3, page_bytes, dtype=torch.uint8)
    launch_copy(pool, packed, pages, scatter=False)
    assert torch.equal(packed, pool[pages.long()])
    other = torch.zeros_like(pool)
    launch_copy(other, packed, pages, scatter=True)
    assert torch.equal(other, pool * torch.isin(torch.arange(6), pages)[:, None])


def test_a_range_of_columns_is_gathered_and_scattered_alone():
    pool, pages, columns = random_pages(6), torch.tensor([4, 1, 5]), slice(4096, 8192)
    out = torch.empty(3, 4096, dtype=torch.uint8)
    assert gather_pages(pool[:, columns], pages, out) is out
    assert torch.equal(out, pool[pages, columns])
    for scatter in (scatter_pages, lambda *a: launch_copy(a[0], a[2], a[1], scatter=True)):
        other = torch.zeros_like(pool)
        scatter(other[:, columns], pages, out)
        assert torch.equal(other[pages, columns], out)
        other[pages, columns] = 0
        assert not other.any()


@pytest.mark.parametrize("page_bytes", [128, 8192, 4096 + 24, PAGE_BYTES])
def test_copying_adds_the_checksums_where_it_is_told(page_bytes):
    pool, pages = random_pages(6, page_bytes), torch.tensor([4, 1, 5])
    expected = checksum_pages(pool[pages])
    packed, sums = torch.empty(3, page_bytes, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.int64)
    gather_pages(pool, pages, packed, sum_M=sums[:, 0])
    scatter_pages(pool, pages, packed, sum_M=sums[:, 1])
    launch_copy(pool, packed, pages, scatter=False, sum_M=sums[:, 2])
    launch_copy(pool, packed, pages, scatter=True, sum_M=sums[:, 3])
    assert torch.equal(sums, expected[:, None].expand(-1, 4))


def test_without_a_compiler_the_bytes_are_the_same(monkeypatch):
    pool, pages = random_pages(6), torch.tensor([4, 1, 5])
    packed, sums = gather_pages(pool, pages), checksum_pages(pool)
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert torch.equal(gather_pages(pool, pages), packed)
    assert torch.equal(checksum_pages(pool), sums)
    other = torch.zeros_like(pool)
    scatter_pages(other, pages, packed)
    assert torch.equal(other[pages], packed)


def test_pages_outside_the_pool_are_refused():
    with pytest.raises(IndexError):
        gather_pages(random_pages(3), torch.tensor([0, 3]))


def test_scatter_refuses_bytes_of_another_page_size():
    with pytest.raises(ValueError, match="2 pages of 12416 bytes"):
        scatter_pages(random_pages(4), torch.tensor([0, 1]), random_pages(2, 256))


@pytest.mark.parametrize("page_bytes", [4, 128, 4096 + 20, PAGE_BYTES])
def test_checksums_follow_the_definition_everywhere(page_bytes, monkeypatch):
    pages, expected = random_pages(3, page_bytes), []
    for page in pages:
        words = [int.from_bytes(bytes(page[i : i + 4].tolist()), "little") for i in range(0, page_bytes, 4)]
        total = sum((w + 1) * (4 * x * x + 6 * x + 1) for x, w in enumerate(reversed(words), 1)) % 2**64
        expected.append(total - 2**64 if total >= 2**63 else total)
    assert checksum_pages(pages).tolist() == expected
    assert launch_checksum(pages).tolist() == expected
    monkeypatch.setattr(cpu, "checksum_pages", lambda bytes_MB: None)  # no compiler
    assert checksum_pages(pages).tolist() == expected


def test_a_checksum_is_of_64_bits_however_large_the_page():
    words = torch.full((1, 1 << 21), -1, dtype=torch.int32)
    x = torch.arange(1 << 21, 0, -1)
    expected = (4 * x * x + 6 * x + 1 << 32).sum()  # modulo 2**64, as (w + 1) is 2**32
    assert checksum_pages(words.view(torch.uint8)).item() == expected.item()


def test_the_checksum_tells_every_bit_of_a_word_and_every_exchange():
    page = random_pages(1, 4096 + 128)
    words = page.view(torch.int32)
    changed = page.repeat(64, 1)
    for i in range(32):
        changed.view(torch.int32)[i, 17] ^= torch.tensor(1).int() << i  # one bit
        j = 1 << (i % 10)  # however far apart
        changed.view(torch.int32)[32 + i, [i, i + j]] = words[0, [i + j, i]]  # two words exchanged
    assert len({*checksum_pages(changed).tolist(), *checksum_pages(page).tolist()}) == 65


def test_the_checksum_tells_exchanged_words_that_differ_in_their_top_bit_only():
    words = torch.zeros(2, 1056, dtype=torch.int32)
    words[0, 0] = words[1, 1024] = -(2**31)
    first, second = checksum_pages(words.view(torch.uint8)).tolist()
    assert first != second


def test_the_checksum_tells_runs_of_zeros_apart():
    pages = random_pages(1, 4096).repeat(9, 1)
    for i in range(8):
        pages[i + 1, 64 * i : 64 * (i + 1) + 512 * i] = 0
    assert len(set(checksum_pages(pages).tolist())) == 9
    empty = checksum_pages(torch.zeros(1, 4096, dtype=torch.uint8))
    shorter = checksum_pages(torch.zeros(1, 2048, dtype=torch.uint8))
    assert empty.item() not in (0, shorter.item())
