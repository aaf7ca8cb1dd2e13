"""The message of DiLoCo with chunked top-k: who is chosen, what is sent of them, and what comes out."""

import pytest
import torch

from launch.benchmarks.local_updates import CHUNK, KEPT, decode, encode, kept_of, message_bytes, quantise


@pytest.mark.parametrize("size", [1, 2, 63, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 100])
def test_the_largest_of_each_chunk_come_out_where_they_were(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    message = encode(values)
    assert (message.dtype, len(message)) == (torch.uint8, message_bytes(size))
    expected = torch.zeros(size)
    kept = torch.cat([begin + part.abs().argsort(descending=True)[:KEPT] for begin, part in enumerate_chunks(values)])
    assert len(kept) == kept_of(size)
    codes, table = quantise(values[kept.sort().values])
    expected[kept.sort().values] = table[codes]
    assert torch.equal(decode(message, size), expected)


def enumerate_chunks(values):
    return [(begin, values[begin : begin + CHUNK]) for begin in range(0, len(values), CHUNK)]


def test_an_entry_costs_fourteen_bits():
    assert message_bytes(100 * CHUNK) == 16 + 100 * KEPT * 14 // 8


def test_each_bin_sends_its_own_mean():
    # Mean 0, norm 6, deviation 6 / sqrt(3): a bin is 5.196 wide, and 0 rounds to the third.
    codes, table = quantise(torch.tensor([-(18**0.5), 0.0, 0.0, 18**0.5]))
    assert codes.tolist() == [1, 2, 2, 3]
    torch.testing.assert_close(table, torch.tensor([0.0, -(18**0.5), 0.0, 18**0.5]))
    codes, table = quantise(torch.full((5,), 7.0))
    assert table[codes].tolist() == [7.0] * 5
