"""What compressing a gradient of 25 million values costs on one core."""

import time

import torch

from ds_wsi.compression.residual import Residuals
from ds_wsi.compression.selection import apply, layout_of, pieces_of, sections_of, select, spans_of
from ds_wsi.compression.wire import decode, encode

D, KEEP, LIMIT_S = 25_000_000, 0.01, 0.25


def round_trip(residuals, gradient):
    """Error feedback, selection, message, and the message back as a dense tensor."""
    spans = spans_of((D,), 0)
    pieces = pieces_of(spans, 0, D)
    pending = residuals.accumulate(("all",), (D,), gradient)
    chosen = select(pending.corrected, spans, KEEP)
    message = encode(sections_of(chosen, pieces, 0), step=0)
    residuals.commit(pending, chosen.indices, chosen.values)
    dense = torch.zeros(D)
    apply(decode(message, layout=layout_of(pieces), step=0), pieces, dense)
    return len(message)


def test_a_gradient_is_compressed_and_read_in_a_quarter_of_a_second():
    """The median of 5 times, each the processor time of this thread: other processes on the machine do not count."""
    residuals, generator, seconds = Residuals(), torch.Generator().manual_seed(0), []
    gradient = torch.randn(D, generator=generator)
    for _ in range(5):
        begin = time.thread_time()
        size = round_trip(residuals, gradient)
        seconds.append(time.thread_time() - begin)
    assert sorted(seconds)[2] <= LIMIT_S, seconds
    assert size <= 0.0128 * 4 * D
