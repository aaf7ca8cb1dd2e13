"""Cox's step over real processes: scores are gathered, and every rank has one process's gradient to the last bit."""

import math

import pytest
import torch
import torch.distributed as dist

from ds_wsi.targets.cox import cox_step, cox_surrogate
from ds_wsi.targets.denominators import target_factor
from ds_wsi.targets.survival_table import SurvivalTable, gather_table
from harness import run_ranks

pytestmark = pytest.mark.distributed
WORLD = 3
N = 9
ROWS = ((7, 0, 3, 4, 8, 1), (2, 6, 5), ())  # of each rank: unequal numbers, and one without a bag
TIMES = torch.tensor([3, 1, 2, 3, 5, 2, 2, math.nan, 3], dtype=torch.float64)
EVENTS = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
STRATA = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0, 0])
IDS = torch.tensor([2**60 + 5, 4, 2**60 + 6, 1, 9, 0, 7, 3, 8])  # beyond float64's whole numbers


def model_and_features():
    torch.manual_seed(0)
    features = torch.randn(N, 4, dtype=torch.float64) * math.pi
    return torch.nn.Linear(4, 1).double(), features


def table_of(scores, rows):
    rows = torch.tensor(rows, dtype=torch.int64)
    return SurvivalTable.of(scores, TIMES[rows], EVENTS[rows], IDS[rows], STRATA[rows])


def flat_gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def on_ranks():
    rank = dist.get_rank()
    model, features = model_and_features()
    own_rows = list(ROWS[rank])
    scores = model(features[own_rows])
    table, rows = gather_table(table_of(scores, own_rows))
    step = cox_step(table)
    (cox_surrogate(scores, step.gradient[rows]) * target_factor(1, WORLD, 1)).backward()
    total = flat_gradient(model)
    dist.all_reduce(total)
    pair = dist.new_group([0, 1])
    of_pair = gather_table(table_of(scores, own_rows), pair) if rank < 2 else None
    nobody = gather_table(table_of(torch.zeros(0), []))
    return {
        "gradient": total / WORLD,
        "loss": step.loss,
        "scores": step.gradient,
        "columns": [table.scores, table.times, table.events, table.strata, table.ids],
        "rows": [rows.start, rows.stop],
        "pair": [len(of_pair.table), of_pair.rows.start, of_pair.rows.stop] if of_pair else [],
        "nobody": len(nobody.table) + nobody.rows.stop,
    }


def test_a_step_over_ranks_is_one_process():
    results = run_ranks(on_ranks, WORLD)
    model, features = model_and_features()
    scores = model(features)
    one = cox_step(table_of(scores, range(N)))
    cox_surrogate(scores, one.gradient).backward()
    order = [row for rows in ROWS for row in rows]
    starts = [[0, 6], [6, 9], [9, 9]]
    for rank, result in enumerate(results):
        assert result["loss"] == one.loss
        assert torch.equal(result["scores"], one.gradient[order])
        torch.testing.assert_close(result["gradient"], flat_gradient(model), rtol=0, atol=1e-15)
        given = [scores.detach()[:, 0], TIMES, EVENTS, STRATA, IDS]
        for column, expected in zip(result["columns"], given, strict=True):
            assert column.dtype is expected.dtype
            torch.testing.assert_close(column, expected[order], rtol=0, atol=0, equal_nan=True)
        assert result["rows"] == starts[rank]
        assert result["pair"] == ([N, *starts[rank]] if rank < 2 else [])
        assert result["nobody"] == 0
