"""Aggregators beside torchmil 1.0, a second witness where what it computes is what its papers say; no dependency.

Not its instance loss for CLAM (version 1.0.2 pairs every instance with every target) nor its DTFD (no class
probabilities, every instance passed on, one logit).
"""

import pytest
import torch
from aggregator_cases import CLASSES, DIM, assert_same, build, draw_bag, linear, run
from torch import nn

from ds_wsi.models.aggregators.transmil import NystromAttention, PyramidPositions


def test_gated_attention_pooling_is_torchmils():
    library = pytest.importorskip("torchmil.nn", reason="torchmil, the second witness, is not installed")
    module, bag = build("clam_sb", embed_dim=7, hidden_dim=4), draw_bag(9)
    oracle = library.AttentionPool(in_dim=7, att_dim=4, gated=True).double()
    oracle.fc1.module.load_state_dict(module.attention.attention_v.state_dict())
    oracle.fc_gated.module.load_state_dict(module.attention.attention_u.state_dict())
    # It has no bias here, which a softmax does not see.
    oracle.fc2.weight.data = module.attention.attention_w.weight.detach().clone()
    pooled = oracle(module.embed(bag)[None])[0]
    assert_same(run(module, bag)[0], linear(module.classifier, pooled))


def test_dsmil_attention_is_torchmils():
    models = pytest.importorskip("torchmil.models", reason="torchmil, the second witness, is not installed")
    module, bag = build("dsmil", query_dim=4), draw_bag(9)
    oracle = models.DSMIL(in_shape=(DIM,), att_dim=4, nonlinear_q=True).double()
    oracle.q_nn.load_state_dict(module.query.state_dict())
    for c in range(CLASSES):
        oracle.inst_classifier.weight.data = module.instance_classifier.weight[c : c + 1].detach().clone()
        oracle.inst_classifier.bias.data = module.instance_classifier.bias[c : c + 1].detach().clone()
        weights = oracle(bag[None], return_att=True)[1].flatten()
        assert_same(run(module, bag)[1][:, c], weights)


@pytest.mark.parametrize("length", [3, 8, 21])
def test_nystrom_attention_is_torchmils_with_its_residual_off(length):
    attention = pytest.importorskip("torchmil.nn.attention", reason="torchmil, the second witness, is not installed")
    torch.manual_seed(0)
    module = NystromAttention(8, 2, 4, 0.0).double()
    nn.init.zeros_(module.residual.weight)
    oracle = attention.NystromAttention(8, att_dim=8, n_heads=2, n_landmarks=4).double()
    oracle.qkv_nn.weight.data = module.qkv.weight.detach().clone()
    x = torch.randn(length, 8, dtype=torch.float64)
    mixed, weights = oracle(x[None], return_att=True)
    output, first = module(x)
    assert_same(output, linear(module.out, mixed[0]))
    assert_same(first, weights[0].mean(0)[0].clamp_min(0))


def test_pyramid_positions_are_torchmils():
    transmil = pytest.importorskip("torchmil.models.transmil", reason="torchmil, the second witness, is not installed")
    torch.manual_seed(0)
    module, oracle = PyramidPositions(6).double(), transmil.PPEG(6).double()
    for convolution, other in zip(module.convolutions, (oracle.proj, oracle.proj1, oracle.proj2), strict=True):
        other.load_state_dict(convolution.state_dict())
    tokens = torch.randn(1 + 25, 6, dtype=torch.float64)
    assert_same(module(tokens, 5), oracle(tokens[None], 5, 5)[0])
