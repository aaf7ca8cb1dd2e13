"""The wire format: what was encoded is decoded, in the bytes the formulas say, and hostile bytes are refused."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_wsi.compression.indices import INDEX_ENCODINGS, index_bytes, low_width
from ds_wsi.compression.wire import (
    ABSOLUTE,
    ENTRY,
    HEADER,
    VALUE_ENCODINGS,
    Section,
    WireError,
    cheapest,
    decode,
    encode,
    message_bytes,
    reseal,
    round_values,
    section_bytes,
)

CASES = [(1, 1), (1, 0), (7, 3), (8, 8), (64, 1), (1000, 10), (1000, 999), (4096, 128), (100_003, 1_000)]


def a_section(d, nnz, number=0, seed=0):
    generator = torch.Generator().manual_seed(seed + d)
    indices = torch.randperm(d, generator=generator)[:nnz].sort().values
    return Section(number, d, indices, torch.randn(nnz, generator=generator))


def densified(section):
    flat = torch.zeros(section.numel)
    flat[slice(None) if section.indices is None else section.indices] = section.values
    return flat


@pytest.mark.parametrize("values", VALUE_ENCODINGS)
@pytest.mark.parametrize("indices", INDEX_ENCODINGS)
def test_what_is_decoded_was_encoded_and_has_the_formulas_size(indices, values):
    for d, nnz in CASES:
        section = a_section(d, nnz)
        message = encode([section], step=5, source=2, shard=3, flags=ABSOLUTE, values=values, indices=indices)
        assert len(message) == message_bytes([section_bytes(indices, values, d, nnz)])
        decoded = decode(message, layout=[(0, d)], step=5)
        assert (decoded.step, decoded.source, decoded.shard, decoded.flags) == (5, 2, 3, ABSOLUTE)
        (back,) = decoded.sections
        rounded = round_values(section.values, values)
        assert torch.equal(densified(back), densified(Section(0, d, section.indices, rounded)))
        if indices != "dense":
            assert torch.equal(back.indices, section.indices)
            assert back.values.numpy().tobytes() == rounded.numpy().tobytes()


def test_all_tensors_of_a_step_are_one_message():
    sections = [
        a_section(1000, 10, 4),
        a_section(50, 50, 1),
        a_section(300, 20, 9),
        Section(2, 0, None, torch.zeros(0)),
    ]
    sections.append(Section(3, 5, None, torch.arange(5.0)))
    message = encode(sections, step=0)
    decoded = decode(message, layout=[(s.id, s.numel) for s in sections])
    assert all(torch.equal(densified(one), densified(two)) for one, two in zip(decoded.sections, sections, strict=True))
    sizes = [section_bytes(cheapest("fp32", s.numel, len(s.values)), "fp32", s.numel, len(s.values)) for s in sections]
    assert len(message) == message_bytes(sizes)


def test_an_empty_message_is_its_header():
    assert len(encode([], step=0)) == HEADER.size == 40
    assert decode(encode([], step=0)).sections == ()


def test_the_cheapest_encoding_is_chosen():
    for values, width in (("fp32", 4), ("fp16", 2)):
        for d, nnz in [*CASES, (1 << 20, 1), (1 << 20, 1 << 10), (1 << 20, 1 << 17), (1 << 20, 1 << 19), (97, 96)]:
            # Sizes written out anew, not by the functions under test.
            gap = min(w * -(-nnz // 8) + -(-(nnz + (d - 1 >> w)) // 8) for w in range(32)) if nnz else 0
            sizes = {"coo": (4 + width) * nnz, "bitmap": -(-d // 8) + width * nnz, "dense": width * d}
            sizes["gap"] = gap + width * nnz
            assert section_bytes(cheapest(values, d, nnz), values, d, nnz) == min(sizes.values())
            assert {name: section_bytes(name, values, d, nnz) for name in INDEX_ENCODINGS} == sizes


def test_bitmap_beats_coo_from_one_in_32():
    d = 1 << 20
    assert index_bytes("bitmap", d, d // 32) == index_bytes("coo", d, d // 32)
    assert index_bytes("bitmap", d, d // 32 - 1) > index_bytes("coo", d, d // 32 - 1)
    assert index_bytes("bitmap", d, d // 32 + 1) < index_bytes("coo", d, d // 32 + 1)


def test_gaps_take_two_bits_more_than_the_logarithm():
    for d, nnz in [(25_000_000, 250_000), (25_000_000, 25_000), (1 << 20, 1 << 14)]:
        assert 8 * index_bytes("gap", d, nnz) / nnz <= 2 + np.log2(d / nnz)
        assert cheapest("fp32", d, nnz) == "gap"


def test_clustered_and_extreme_indices():
    d = 2**32 - 1
    far = torch.tensor([0, 1, 2, 2**31, d - 1])
    for indices in ("coo", "gap"):
        decoded = decode(encode([Section(0, d, far, torch.ones(5))], step=0, indices=indices))
        assert torch.equal(decoded.sections[0].indices, far)


def test_values_too_large_saturate_and_round_as_a_receiver_decodes():
    values = torch.tensor([1e9, -1e9, 1 / 3, 1e-9, -0.0])
    assert round_values(values, "fp16").tolist() == [65504, -65504, torch.tensor(1 / 3).half().item(), 0, 0]
    assert round_values(torch.tensor([3.4e38]), "bf16").isfinite().all()


BAD = [
    (Section(0, 5, torch.tensor([1, 1]), torch.ones(2)), r"ascend strictly within 0\.\.4"),
    (Section(0, 5, torch.tensor([2, 1]), torch.ones(2)), r"ascend strictly"),
    (Section(0, 5, torch.tensor([1, 5]), torch.ones(2)), r"ascend strictly"),
    (Section(0, 5, torch.tensor([-1, 3]), torch.ones(2)), r"ascend strictly"),
    (Section(0, 5, torch.tensor([1]), torch.ones(2)), r"one an index, got 2"),
    (Section(0, 5, None, torch.ones(4)), r"one an index, got 4"),
    (Section(7, 5, torch.tensor([1]), torch.tensor([float("nan")])), r"values must be finite \(tensor 7\). HINT"),
    (Section(0, 5, torch.tensor([1]), torch.tensor([float("-inf")])), r"values must be finite"),
    (Section(0, 2**32, torch.tensor([1]), torch.ones(1)), r"at most 4294967295 entries"),
]


@pytest.mark.parametrize(("section", "said"), BAD)
def test_what_cannot_be_sent_is_refused(section, said):
    with pytest.raises(ValueError, match=said):
        encode([section], step=0)


def changed(message, at, value, form="<B"):
    """A message with a field overwritten and the checksum right again."""
    data = message.numpy().copy()
    data[at : at + struct.calcsize(form)] = np.frombuffer(struct.pack(form, value), np.uint8)
    return torch.from_numpy(reseal(data))


ROW = HEADER.size  # of the table's first entry
PAYLOAD = HEADER.size + ENTRY.itemsize
HOSTILE = [
    ("coo", 0, ord("X"), "<B", "begin"),
    ("coo", 4, 2, "<H", "version 1"),
    ("coo", 6, 2, "<H", "flags 2"),
    ("coo", 24, 2**32 - 1, "<I", "entries"),
    ("coo", 32, 2**63, "<Q", "bytes"),
    ("coo", ROW + 4, 9, "<B", "encodings must be known"),
    ("coo", ROW + 5, 3, "<B", "encodings must be known"),
    ("coo", ROW + 6, 1, "<H", "encodings must be known"),
    ("coo", ROW + 12, 2**32 - 1, "<I", "entry must send"),
    ("coo", ROW + 8, 5, "<I", "entry must send"),
    ("dense", ROW + 12, 3, "<I", "a dense one all"),
    ("coo", ROW + 12, 9, "<I", "length of its encoding"),
    ("bitmap", ROW + 8, 2**32 - 1, "<I", "length of its encoding"),
    ("gap", ROW + 8, 2**32 - 1, "<I", "length of its encoding"),
    ("coo", ROW + 16, 2**64 - 1, "<Q", "length of its encoding"),
    ("coo", PAYLOAD, 100, "<I", "indices must be 10"),  # unsorted
    ("coo", PAYLOAD + 36, 100, "<I", "indices must be 10"),  # out of range
    ("bitmap", PAYLOAD, 0, "<Q", "indices must be 10"),
    ("bitmap", PAYLOAD + 12, 255, "<B", "bits after the last"),
    ("gap", PAYLOAD + 6, 255, "<B", "indices must be 10"),
    ("coo", PAYLOAD + 40, float("nan"), "<f", "finite"),
    ("dense", PAYLOAD, float("inf"), "<f", "finite"),
]


@pytest.mark.parametrize(("indices", "at", "value", "form", "said"), HOSTILE)
def test_each_hostile_field_is_refused(indices, at, value, form, said):
    message = encode([a_section(100, 10)], step=0, indices=indices)
    decode(message)
    with pytest.raises(WireError, match=said):
        decode(changed(message, at, value, form))


def test_indices_that_a_gap_coding_repeats_are_refused():
    message = encode([Section(0, 64, torch.tensor([4, 5]), torch.ones(2))], step=0, indices="gap")
    planes = slice(PAYLOAD, PAYLOAD + low_width(64, 2))
    data = message.numpy().copy()
    data[planes] = 0  # both low parts 0, one high part: index 0 twice
    with pytest.raises(WireError, match=r"ascending strictly"):
        decode(torch.from_numpy(reseal(data)))


def test_torn_and_unexpected_messages_are_refused():
    message = encode([a_section(100, 10, 1), a_section(20, 3, 2)], step=4)
    for length in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:length])
    with pytest.raises(WireError, match=r"checksum"):
        decode(torch.cat([message[:-1], message[-1:] ^ 1]))
    with pytest.raises(WireError, match=r"bytes"):
        decode(torch.cat([message, message]))
    with pytest.raises(WireError, match=r"step 5, got 4"):
        decode(message, step=5)
    with pytest.raises(WireError, match=r"tensors that both ranks know"):
        decode(message, layout=[(1, 100), (2, 21)])
    with pytest.raises(WireError, match=r"a tensor once"):
        decode(changed(message, ROW + ENTRY.itemsize, 1, "<I"))
    with pytest.raises(WireError, match=r"1-D uint8"):
        decode(message.float())


FUZZED_EXAMPLES, FUZZED_MESSAGES = 250, 160


def mutations(random, seeds):
    """Messages: random, cut, joined, or valid but for some bytes or 32-bit fields; most with a right checksum."""
    for _ in range(FUZZED_MESSAGES):
        data = seeds[random.integers(len(seeds))].copy()
        kind = random.integers(5)
        if kind == 0:
            data = random.integers(0, 256, random.integers(0, 400), dtype=np.uint8)
        elif kind == 1:
            data = data[: random.integers(len(data))]
        elif kind == 2:
            data = np.concatenate([data, seeds[random.integers(len(seeds))]])
        elif kind == 3:
            positions = random.integers(0, len(data), random.integers(1, 6))
            data[positions] = random.integers(0, 256, len(positions))
        else:
            at = 4 * random.integers(len(data) // 4)
            hostile = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FC00000, len(data))
            data[at : at + 4] = np.frombuffer(struct.pack("<I", hostile[random.integers(len(hostile))]), np.uint8)
        if len(data) >= HEADER.size and random.random() < 0.8:
            if random.random() < 0.5:  # so that what is behind the header's checks is reached
                data[32:40] = np.frombuffer(struct.pack("<Q", len(data) - HEADER.size), np.uint8)
            reseal(data)
        yield data


@pytest.fixture(scope="module")
def seeds():
    messages = [
        encode([a_section(d, nnz, 0, 1), a_section(40, 4, 1)], step=1, values=values, indices=indices).numpy()
        for d, nnz in ((100, 10), (33, 33), (300, 5), (20, 0))
        for values in VALUE_ENCODINGS
        for indices in INDEX_ENCODINGS
    ]
    return [*messages, encode([], step=0).numpy()]


@settings(max_examples=FUZZED_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63 - 1))
def test_ten_thousand_hostile_messages_are_read_or_refused(seed, seeds):
    """Whatever passes is sound: indices ascend within d, values are finite."""
    assert FUZZED_EXAMPLES * FUZZED_MESSAGES >= 10_000
    for data in mutations(np.random.default_rng(seed), seeds):
        before = data.tobytes()
        try:
            decoded = decode(torch.from_numpy(data))
        except WireError:
            continue
        assert data.tobytes() == before
        for section in decoded.sections:
            assert section.values.isfinite().all()
            assert section.indices is not None or len(section.values) == section.numel
            if section.indices is not None and len(section.indices):
                assert len(section.indices) == len(section.values)
                assert section.indices[0] >= 0
                assert section.indices[-1] < section.numel
                assert (section.indices.diff() > 0).all()


def test_the_fuzz_reaches_the_payloads(seeds):
    """Some of the mutated messages are read and some are refused for what is behind the header."""
    said = []
    for data in (data for seed in range(40) for data in mutations(np.random.default_rng(seed), seeds)):
        try:
            decode(torch.from_numpy(data))
            said.append("read")
        except WireError as error:
            said.append(str(error))
    for part in ("read", "header", "begin", "announces", "encodings", "send", "length", "ascending", "finite", "bits"):
        assert any(part in text for text in said), part
