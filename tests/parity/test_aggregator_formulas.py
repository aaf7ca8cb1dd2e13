"""Each aggregator is its paper's formula, written again for one bag in plain loops."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from aggregator_cases import CLASSES, DIM, LABEL, assert_same, build, draw_bag, gated, linear, run
from torch import nn

from ds_wsi.models import build_aggregator
from ds_wsi.models.aggregators import check_aggregator, transmil
from ds_wsi.models.aggregators.transmil import NystromAttention
from ds_wsi.stacking import stack_bags


def smooth_svm(pair, target):
    """The loss with tau = alpha = 1: log sum_j exp(s_j + [j != y] - s_y)."""
    return math.log(sum(math.exp(pair[j] + (j != target) - pair[target]) for j in range(2)))


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
def test_clam(name, length, subtyping):
    module, bag = build(name, embed_dim=7, hidden_dim=4, k_sample=3, subtyping=subtyping), draw_bag(length)
    logits, attention, loss = run(module, bag, labelled=True)
    h = torch.relu(linear(module.embedding[0], bag))
    weights = gated(module.attention, h).softmax(0)
    if name == "clam_sb":
        assert_same(logits, linear(module.classifier, (weights * h).sum(0)))
        assert_same(attention, weights[:, 0])
    else:
        pooled = [(weights[:, c : c + 1] * h).sum(0) for c in range(CLASSES)]
        assert_same(logits, torch.cat([linear(module.classifiers[c], pooled[c]) for c in range(CLASSES)]))
        assert_same(attention, weights)
    total = 0.0
    for c in range(CLASSES):
        if c != LABEL and not subtyping:
            continue
        order = weights[:, c if name == "clam_mb" else 0].argsort(descending=True).tolist()
        size = min(3, length)
        samples = [(row, 1 if c == LABEL else 0) for row in order[:size]]
        if c == LABEL:
            samples += [(row, 0) for row in order[-size:]]
        pairs = linear(module.instance_classifier, h)[:, 2 * c : 2 * c + 2]
        total += sum(smooth_svm(pairs[row].tolist(), target) for row, target in samples) / len(samples)
    assert_same(loss, 0.3 / 0.7 * total / (CLASSES if subtyping else 1))


def test_dsmil():
    module, bag = build("dsmil", query_dim=4), draw_bag(9)
    logits, attention, loss = run(module, bag, labelled=True)
    scores = linear(module.instance_classifier, bag)
    queries = torch.tanh(linear(module.query[2], torch.relu(linear(module.query[0], bag))))
    bag_features, largest = [], []
    for c in range(CLASSES):
        critical = scores[:, c].argmax()
        largest.append(scores[critical, c])
        weights = torch.stack([queries[k] @ queries[critical] / math.sqrt(4) for k in range(9)]).softmax(0)
        assert_same(attention[:, c], weights)
        bag_features.append(sum(weights[k] * bag[k] for k in range(9)))
    # The original's head: a convolution of the classes' channels over the whole width.
    kernel = module.classifier.weight.unflatten(1, (CLASSES, DIM))
    assert_same(logits, F.conv1d(torch.stack(bag_features)[None], kernel, module.classifier.bias).flatten())
    assert_same(loss, F.cross_entropy(torch.stack(largest), torch.tensor(LABEL)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("length", [1, 3, 14])
@pytest.mark.parametrize("distillation", ["maxs", "maxmins", "afs"])
def test_dtfd(distillation, length, train):
    module, bag = build("dtfd", embed_dim=7, hidden_dim=4, distillation=distillation).train(train), draw_bag(length)
    torch.manual_seed(3)
    logits, attention, loss = run(module, bag, labelled=True)
    torch.manual_seed(3)
    torch.randperm(4)  # of the bag before
    count = min(4, length)
    drawn = [part.tolist() for part in torch.randperm(length).tensor_split(count)]
    parts = drawn if train else [list(range(p, length, count)) for p in range(count)]
    h = torch.relu(linear(module.embedding[0], bag))
    passed, part_weights, tier_1 = [], [], 0.0
    for part in parts:
        members = h[part]
        weights = gated(module.attention_1, members).softmax(0)
        feature = (weights * members).sum(0)
        tier_1 += F.cross_entropy(linear(module.classifier_1, feature), torch.tensor(LABEL)) / count
        chances = ((weights * members) @ module.classifier_1.weight.T).softmax(1)[:, -1]
        high, low = members[chances.argmax()], members[chances.argmin()]
        passed += {"maxs": [high], "maxmins": [high, low], "afs": [feature]}[distillation]
        part_weights.append(weights[:, 0])
    features = torch.stack(passed)
    across = gated(module.attention_2, features).softmax(0)
    assert_same(logits, linear(module.classifier_2, (across * features).sum(0)))
    assert_same(loss, tier_1)
    shares = across.flatten().unflatten(0, (count, -1)).sum(1)
    for part, weights, share in zip(parts, part_weights, shares, strict=True):
        assert_same(attention[part], weights * share)


def acmil_reference(module, bag, masks):
    h = torch.relu(linear(module.embedding[0], bag))
    weights = gated(module.attention, h).masked_fill(masks, -1e30).softmax(0)  # [N, M]
    features = [(weights[:, m : m + 1] * h).sum(0) for m in range(weights.shape[1])]
    bag_weights = weights.mean(1)
    loss = sum(
        F.cross_entropy(linear(classifier, feature), torch.tensor(LABEL)) / len(features)
        for classifier, feature in zip(module.branch_classifiers, features, strict=True)
    )
    pairs = list(combinations(range(len(features)), 2))
    loss += sum(torch.cosine_similarity(weights[:, i], weights[:, j], dim=0) for i, j in pairs) / max(1, len(pairs))
    return linear(module.classifier, bag_weights @ h), bag_weights, loss


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 12])
def test_acmil(length, branches, monkeypatch):
    module, bag = build("acmil", embed_dim=7, hidden_dim=4, branches=branches), draw_bag(length)
    unmasked = torch.zeros(length, branches, dtype=torch.bool)
    for output, expected in zip(run(module, bag, True), acmil_reference(module, bag, unmasked), strict=True):
        assert_same(output, expected)
    module.train()
    drawn = []

    def draw(scores, cu_seqlens, method=module.draw_masks):
        drawn.append(method(scores, cu_seqlens))
        return drawn[-1]

    monkeypatch.setattr(module, "draw_masks", draw)
    output = run(module, bag, True)
    masks = drawn[0][4:]
    for one, expected in zip(output, acmil_reference(module, bag, masks), strict=True):
        assert_same(one, expected)
    highest = gated(module.attention, torch.relu(linear(module.embedding[0], bag))).argsort(0, descending=True)
    assert masks.sum(0).tolist() == [int(0.6 * min(10, length))] * branches
    for branch in range(branches):
        assert set(masks[:, branch].nonzero().flatten().tolist()) <= set(highest[:10, branch].tolist())


def test_acmil_masks_differ_between_steps_and_branches():
    module, bag = build("acmil", embed_dim=7, hidden_dim=4), draw_bag(40)
    stack = stack_bags([bag])
    scores = torch.zeros(40, 5)
    torch.manual_seed(1)
    steps = torch.stack([module.draw_masks(scores, stack.cu_seqlens) for _ in range(200)]).double().mean(0)
    assert not steps[10:].any()
    assert (steps[:10] - 0.6).abs().max() < 0.15  # each of the ten highest is masked as often


def nystrom_reference(module, x):
    """Per head, in matrices; the pseudo-inverse as in equation 14, and the residual as a sum over offsets."""
    count, width = x.shape
    size = module.landmarks
    padded = torch.cat([torch.zeros(-count % size, width, dtype=x.dtype), x])
    length, share = len(padded), len(padded) // size
    columns = (padded @ module.qkv.weight.T).split(width // module.heads, 1)
    maps = []
    for head in range(module.heads):
        q, k, v = (columns[part * module.heads + head] for part in range(3))
        q = q / math.sqrt(q.shape[1])
        q_mean, k_mean = (torch.stack([part.mean(0) for part in each.split(share)]) for each in (q, k))
        maps.append([(q @ k_mean.T).softmax(1), (q_mean @ k_mean.T).softmax(1), (q_mean @ k.T).softmax(1), v])
    scale = max(m[1].sum(1).max() for m in maps) * max(m[1].sum(0).max() for m in maps)
    mixed, first = [], 0
    for head, (left, middle, right, v) in enumerate(maps):
        z, unit = middle.T / scale, torch.eye(size, dtype=x.dtype)
        for _ in range(6):
            az = middle @ z
            z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
        kernel, residual = module.residual.weight[head, 0, :, 0], torch.zeros_like(v)
        for row in range(length):
            for offset in range(-16, 17):
                if 0 <= row + offset < length:
                    residual[row] += kernel[offset + 16] * v[row + offset]
        mixed.append(left @ z @ right @ v + residual)
        first = first + (left @ z @ right)[length - count, length - count :] / module.heads
    return linear(module.out, torch.cat(mixed, 1))[-count:], first


@pytest.mark.parametrize(("length", "landmarks"), [(1, 4), (2, 4), (7, 4), (16, 4), (1, 16), (7, 16), (30, 24)])
def test_transmil(length, landmarks):
    module, bag = build("transmil", embed_dim=8, heads=2, landmarks=landmarks), draw_bag(length)
    logits, attention, _ = run(module, bag)

    def norm(layer, x):
        return F.layer_norm(x, (8,), layer.weight, layer.bias)

    h = torch.relu(linear(module.embedding[0], bag))
    side = math.ceil(math.sqrt(length))
    repeated = side**2 - length
    x = torch.cat([module.class_token, h, h[:repeated]])
    x = x + nystrom_reference(module.attention_1, norm(module.norm_1, x))[0]
    # PPEG is one convolution of 7 x 7, of the kernels on top of each other and a 1 in the middle.
    kernel = torch.zeros(8, 1, 7, 7, dtype=x.dtype)
    kernel[:, :, 3, 3] = 1
    for margin, convolution in zip((0, 1, 2), module.positions.convolutions, strict=True):
        kernel += F.pad(convolution.weight, [margin] * 4)
    bias = sum(convolution.bias for convolution in module.positions.convolutions)
    square = F.conv2d(x[1:].T.reshape(8, side, side)[None], kernel, bias, padding=3, groups=8)
    x = torch.cat([x[:1], square[0].flatten(1).T])
    added, first = nystrom_reference(module.attention_2, norm(module.norm_2, x))
    assert_same(logits, linear(module.classifier, norm(module.norm, (x + added)[0])))
    weights = first.clamp_min(0)[1:]
    weights = torch.stack([weights[k] + (weights[length + k] if k < repeated else 0) for k in range(length)])
    assert_same(attention, weights / weights.sum())


@pytest.mark.parametrize(("length", "landmarks"), [(3, 16), (15, 16), (21, 12)])
def test_gradients_of_a_short_bag_whose_equal_landmarks_are_one(length, landmarks):
    torch.manual_seed(0)
    module = NystromAttention(8, 2, landmarks, 0.0).double()
    nn.init.normal_(module.qkv.weight)
    x = torch.randn(length, 8, dtype=torch.float64, requires_grad=True)
    inputs, outward = (x, *module.parameters()), torch.randn(length, 8, dtype=torch.float64)
    gradients = torch.autograd.grad(module(x)[0], inputs, outward)
    expected = torch.autograd.grad(nystrom_reference(module, x)[0], inputs, outward)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-10)


def test_nystrom_attention_with_a_landmark_a_token_is_softmax_attention(monkeypatch):
    monkeypatch.setattr(transmil, "PINV_ITERATIONS", 60)
    torch.manual_seed(0)
    module = NystromAttention(6, 1, 12, 0.0).double()
    nn.init.zeros_(module.residual.weight)
    nn.init.normal_(module.qkv.weight)
    x = torch.randn(12, 6, dtype=torch.float64)
    q, k, v = (x @ module.qkv.weight.T).chunk(3, 1)
    exact = (q @ k.T / math.sqrt(6)).softmax(1) @ v
    torch.testing.assert_close(module(x)[0], linear(module.out, exact), rtol=1e-6, atol=1e-6)


def test_the_pseudo_inverse_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    module, landmarks = NystromAttention(6, 1, 12, 0.0), torch.randn(2, 1, 12, 6)
    expected = module._inverse(*landmarks, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module._inverse(*landmarks, 1), expected)


def region_attention_reference(module, x):
    """One region [L, D]: per head, EPEG as a sum over offsets along the queries."""
    length, width = x.shape
    columns = linear(module.qkv, x).split(width // module.heads, 1)
    mixed = []
    for head in range(module.heads):
        q, k, v = (columns[part * module.heads + head] for part in range(3))
        logits = q @ k.T / math.sqrt(q.shape[1])
        if module.epeg is not None:
            kernel, added = module.epeg.weight[head, 0, :, 0], torch.zeros_like(logits) + module.epeg.bias[head]
            for row in range(length):
                for offset in range(-(len(kernel) // 2), len(kernel) // 2 + 1):
                    if 0 <= row + offset < length:
                        added[row] += kernel[offset + len(kernel) // 2] * logits[row + offset]
            logits = logits + added
        mixed.append(logits.softmax(1) @ v)
    return linear(module.out, torch.cat(mixed, 1))


@pytest.mark.parametrize("length", [1, 4, 30])
def test_rrtmil(length, monkeypatch):
    options = {"heads": 2, "regions": 2, "epeg_kernel": 3, "representatives": 2}
    module, bag = build("rrtmil", embed_dim=8, **options), draw_bag(length)
    monkeypatch.setattr("ds_wsi.models.aggregators.rrtmil.BLOCK_ELEMENTS", 100)  # one region at a time
    logits, attention, _ = run(module, bag)

    def norm(layer, x):
        return F.layer_norm(x, (8,), layer.weight, layer.bias)

    side = math.ceil(math.sqrt(length))
    side += side % 2
    half = side // 2

    def rows_of(region):
        top, left = region // 2 * half, region % 2 * half
        return [(top + y) * side + left + x for y in range(half) for x in range(half)]

    def padded(x):
        return torch.cat([x, torch.zeros(side**2 - length, 8, dtype=x.dtype)])

    x = torch.relu(linear(module.embedding[0], bag))
    normed, result = padded(norm(module.norm_1, x)), torch.zeros(side**2, 8, dtype=x.dtype)
    for region in range(4):
        result[rows_of(region)] = region_attention_reference(module.regional, normed[rows_of(region)])
    x = x + result[:length]
    normed, result = padded(norm(module.norm_2, x)), torch.zeros(side**2, 8, dtype=x.dtype)
    parts = [normed[rows_of(region)] for region in range(4)]
    logits_of = [part @ module.representing for part in parts]
    for one in range(2):  # a representative attends to those of the same number
        gathered = torch.stack([each[:, one].softmax(0) @ part for each, part in zip(logits_of, parts, strict=True)])
        mixed = region_attention_reference(module.across, gathered)
        for region, each in enumerate(logits_of):
            ranged = (each[:, one] - each[:, one].min()) / (each[:, one].max() - each[:, one].min() + 1e-8)
            result[rows_of(region)] += torch.outer(ranged * each.softmax(1)[:, one], mixed[region])
    x = norm(module.norm, x + result[:length])
    weights = linear(module.attention[2], torch.relu(linear(module.attention[0], x))).softmax(0)
    assert_same(logits, linear(module.classifier, (weights * x).sum(0)))
    assert_same(attention, weights[:, 0])


@pytest.mark.parametrize("length", [1, 11])
def test_abmilx(length):
    module, bag = build("abmilx", embed_dim=8, heads=2), draw_bag(length)
    logits, attention, _ = run(module, bag)
    norm = module.embedding[0]
    h = F.gelu(linear(module.embedding[1], F.layer_norm(bag, (DIM,), norm.weight)))
    pooled = []
    for head, part in enumerate(h.split(4, 1)):
        local = linear(module.local[2], F.gelu(linear(module.local[0], part)))
        normed = F.layer_norm(part, (4,), module.norm_heads.weight, module.norm_heads.bias)
        q, k = linear(module.query_key, normed).chunk(2, 1)
        similarity = (q @ k.T / math.sqrt(4)).softmax(1)
        weights = (local + module.alpha * similarity @ local).softmax(0)  # Eq. 4
        assert_same(attention[:, head], weights[:, 0])
        pooled.append((weights * part).sum(0))
    z = linear(module.projection, torch.cat(pooled))
    z = z + linear(module.mlp[2], F.gelu(linear(module.mlp[0], z)))
    assert_same(logits, linear(module.classifier, F.layer_norm(z, (8,), module.norm.weight)))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("length", [1, 11])
def test_abmil_with_layers_before_the_attention(length, gate):
    module = build("gated_abmil" if gate else "abmil", hidden_dim=4, embed="7-6")
    bag = draw_bag(length)
    logits, attention, _ = run(module, bag)
    assert [type(part).__name__ for part in module.embedding] == ["Linear", "ReLU", "Dropout"] * 2
    assert [part.p for part in module.embedding[2::3]] == [0.25, 0.25]
    h = bag
    for layer in module.embedding[::3]:
        h = torch.relu(linear(layer, h))
    assert h.shape == (length, 6)
    scores = gated(module, h) if gate else linear(module.attention_w, torch.tanh(linear(module.attention_v, h)))
    assert_same(attention, scores.softmax(0)[:, 0])
    assert_same(logits, linear(module.classifier, (scores.softmax(0) * h).sum(0)))


def test_without_such_layers_it_starts_from_the_weights_that_it_always_had():
    """The attention's are drawn first, then the classifier's."""
    torch.manual_seed(0)
    expected = [nn.Linear(DIM, 128), nn.Linear(DIM, 128), nn.Linear(128, 1), nn.Linear(DIM, CLASSES)]
    torch.manual_seed(0)
    weights = build_aggregator("gated_abmil", DIM, CLASSES).state_dict()
    drawn = [parameter for layer in expected for parameter in layer.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(weights.values(), drawn, strict=True))


@pytest.mark.parametrize("embed", ["256-", "x", "0", -3, "64--32", "64,32"])
def test_widths_that_are_none_are_refused(embed):
    with pytest.raises(ValueError, match="embed must be widths of layers such as 256 or 256-128"):
        check_aggregator("abmil", {"embed": embed})
