"""What leaves an encoder, where its weights come from, and what of it is trained."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import timm
import torch
from logs import logged
from safetensors.torch import save_file
from torch import nn

from ds_wsi.models import ModelConfig, SlideModel, build_aggregator, build_encoder, build_model, load_model
from ds_wsi.models.features import features_shape
from ds_wsi.models.freezing import freeze_until
from ds_wsi.models.hub import KNOWN, layers_by_name, resolve_encoder
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags
from ds_wsi.training.prepare import prepare_run
from ds_wsi.training.settings import ModelSettings, TrainSettings

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
BASE = {"aggregator": "gated_abmil", "classes": ("a", "b"), "tiling": asdict(TilingPolicy(tile_size_px=32))}


def tiles(count=5, side=32, dtype=torch.float64):
    return torch.randn(count, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(1))


def small_resnet(**options):
    return build_encoder("resnet10t", channels=(8, 16, 16, 32), **options)


def lively(encoder):
    """Make norms pass gradients: timm's last one of a block is zero at first."""
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return encoder


class TestFeatures:
    def test_flattened_is_the_map_before_the_pooling_and_keeps_the_weights_names(self):
        torch.manual_seed(0)
        flat = small_resnet(features="flattened", tile_size_px=64).eval()
        pooled = small_resnet(features="pooled").eval()
        assert flat.num_features == 32 * 2 * 2
        assert features_shape(flat, 256) == (1, 32 * 8 * 8)  # the paper's map at 256 px, of 512 channels there
        pooled.load_state_dict(flat.state_dict())
        x = tiles(2, 64, torch.float32)
        torch.testing.assert_close(flat(x), pooled.forward_features(x).flatten(1))
        torch.testing.assert_close(flat(x).view(2, 32, -1).mean(-1), pooled(x))

    def test_parameters_without_values_beside_buffers_that_have_theirs(self):
        """Transformers 4 builds a model like this when it loads one."""
        encoder = small_resnet()
        for part in encoder.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.to("meta")))
        assert features_shape(encoder, 64) == (1, 32)
        assert encoder.bn1.running_mean.device.type == "cpu"

    @pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
    def test_widths_are_those_of_what_comes_out(self, name):
        for features in ("pooled", "flattened"):
            encoder = build_encoder(name, features=features, tile_size_px=64).eval()
            assert encoder(tiles(1, 64, torch.float32)).shape == (1, encoder.num_features)

    def test_the_class_token_beside_the_mean_of_the_patches_without_registers(self):
        encoder = build_encoder("vit_tiny_patch16_224", features="cls_mean", tile_size_px=32, **SMALL, reg_tokens=2)
        x = tiles(2, 32, torch.float32)
        tokens = encoder.eval().forward_features(x)
        assert tokens.shape == (2, 1 + 2 + 4, 24)
        torch.testing.assert_close(encoder(x), torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1))
        assert encoder.num_features == 48

    @pytest.mark.parametrize(
        ("name", "features", "message"),
        [
            ("resnet10t", "cls_mean", r"ResNet, which has no class token \(it returns \[1, 512, 1, 1\]\)"),
            ("vit_tiny_patch16_224", "flattened", r"VisionTransformer, which has no feature map"),
            ("resnet10t", "tokens", r"must be one of pooled, flattened, cls_mean, got 'tokens'"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, name, features, message):
        with pytest.raises(ValueError, match=message):
            build_encoder(name, features=features, tile_size_px=32, **(SMALL if "vit" in name else {}))

    def test_tiles_that_the_model_cannot_take_are_named(self):
        with pytest.raises(ValueError, match=r"must take tiles of 40 px, got: .*\. HINT: another --tile_size_px"):
            build_encoder("vit_tiny_patch16_224", tile_size_px=40, **SMALL, dynamic_img_size=True)

    def test_nothing_else_changes_while_the_width_is_found(self):
        torch.manual_seed(3)
        encoder = small_resnet()
        state = torch.get_rng_state()
        torch.manual_seed(3)
        plain = timm.create_model("resnet10t", num_classes=0, channels=(8, 16, 16, 32))
        assert torch.equal(torch.get_rng_state(), state)
        assert encoder.training
        assert all(torch.equal(one, plain.state_dict()[name]) for name, one in encoder.state_dict().items())

    def test_partitioned_it_computes_the_same(self):
        torch.manual_seed(0)
        plain = lively(small_resnet(features="flattened", tile_size_px=32)).double()
        assert_partitioned_equals(plain, lambda: small_resnet(features="flattened", tile_size_px=32))

    def test_a_model_is_rebuilt_from_its_folder(self, tmp_path):
        config = ModelConfig("resnet10t", **BASE, encoder_features="flattened")
        assert round_trip(config, tmp_path)[1].encoder_features == "flattened"
        config = ModelConfig("resnet10t", **BASE, aggregator_options={"hidden_dim": 5})
        assert round_trip(config, tmp_path)[0].aggregator.attention_w.in_features == 5
        options = {"depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
        config = ModelConfig("vit_tiny_patch16_224", **BASE, encoder_features="cls_mean", encoder_options=options)
        model, _ = round_trip(config, tmp_path)
        assert model.encoder.num_features == 48
        assert isinstance(model.encoder.blocks[0].mlp.act, nn.SiLU)

    def test_configs_of_older_versions_are_read(self, tmp_path):
        config = ModelConfig("resnet10t", **BASE)
        config.write(tmp_path / "config.json")
        values = json.loads((tmp_path / "config.json").read_text())
        assert values["version"] == 8
        third = {k: v for k, v in values.items() if not k.startswith("norm_")}
        (tmp_path / "config.json").write_text(json.dumps({**third, "version": 3}))
        read = ModelConfig.read(tmp_path / "config.json")
        assert (read.norm_training, read.norm_evaluation) == ("bag", "running")
        second = {k: v for k, v in third.items() if k != "aggregator_options"}
        (tmp_path / "config.json").write_text(json.dumps({**second, "version": 2}))
        assert ModelConfig.read(tmp_path / "config.json").aggregator_options == {}
        older = {k: v for k, v in second.items() if k not in ("encoder_features", "encoder_options")}
        (tmp_path / "config.json").write_text(json.dumps({**older, "version": 1}))
        read = ModelConfig.read(tmp_path / "config.json")
        assert (read.encoder_features, read.encoder_options) == ("pooled", {})
        (tmp_path / "config.json").write_text(json.dumps({**older, "version": 2}))
        with pytest.raises(ValueError, match="must hold the keys"):
            ModelConfig.read(tmp_path / "config.json")


def round_trip(config, folder):
    model = build_model(config).eval()
    config.write(folder / "config.json")
    save_file(model.state_dict(), folder / "model.safetensors")
    loaded, read = load_model(folder)
    stack = stack_bags([tiles(3, 32, torch.float32)])
    assert torch.equal(loaded(stack).logits, model(stack).logits)
    return loaded, read


def assert_partitioned_equals(plain, build, prepare=None):
    """Features, trained gradients and running statistics, in float64, in mode recompute."""
    other = build().double()
    other.load_state_dict(plain.state_dict())
    models = [SlideModel(encoder, build_aggregator("mean", encoder.num_features, 2)) for encoder in (plain, other)]
    for model in models:
        if prepare is not None:
            prepare(model.encoder)
        model.train()
    partition_layers(other, PartitionPolicy(mode="recompute", chunk_size=2))
    for encoder in (plain, other):
        (encoder(tiles()).square().sum()).backward()
    scale = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert one.requires_grad == two.requires_grad
        assert (one.grad is None) == (two.grad is None) == (not one.requires_grad), name
        if one.grad is not None:
            assert (one.grad - two.grad).abs().max() <= 1e-10 * scale, name
    for (name, one), two in zip(plain.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12, msg=name)


class TestFreezing:
    def test_what_comes_before_is_frozen_and_stays_in_evaluation_mode(self):
        encoder = lively(small_resnet())
        model = SlideModel(encoder, build_aggregator("mean", encoder.num_features, 2))
        frozen = freeze_until(encoder, "layer3")
        assert {"conv1", "layer1", "layer2"} <= set(frozen)
        assert not {"layer3", "layer4"} & set(frozen)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        model.train()
        assert encoder.training
        assert not any(part.training for name in frozen for part in encoder.get_submodule(name).modules())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(stack_bags([tiles(4, 32, torch.float32)])).logits[:, 0].sum().backward()
        optimizer.step()
        for name, value in encoder.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == (name.split(".")[0] in frozen), name

    def test_autograd_keeps_nothing_of_what_is_frozen(self):
        encoder, saved = small_resnet(), []
        freeze_until(encoder, "layer4")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            encoder(tiles(2, 64, torch.float32))
        assert all(shape[-1] <= 4 for shape in saved if len(shape) == 4)  # maps of layer4 and its input

    def test_inside_a_sequence_with_its_parents_parameters(self):
        encoder = build_encoder("vit_tiny_patch16_224", tile_size_px=32, **SMALL)
        freeze_until(encoder, "blocks.1")
        trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"blocks", "norm"}
        assert not any(name.startswith("blocks.0.") for name in trained)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("layr3", r"must name a submodule of ResNet, got 'layr3'\. HINT: did you mean .*layer3"),
            ("conv1", "before it"),
        ],
    )
    def test_other_names_are_refused(self, name, message):
        encoder = small_resnet()
        with pytest.raises(ValueError, match=message):
            freeze_until(encoder, name)

    def test_partitioned_it_computes_the_same(self):
        torch.manual_seed(0)
        plain = lively(small_resnet()).double()
        assert_partitioned_equals(plain, lambda: small_resnet(), lambda e: freeze_until(e, "layer3"))

    def test_a_warming_encoder_rests_and_engines_get_zeros(self):
        encoder = small_resnet()
        model = SlideModel(encoder, build_aggregator("gated_abmil", encoder.num_features, 2, dropout=0.0))
        plain = [p.requires_grad for p in model.parameters()]
        model.warming_up = True
        model.train()
        assert not any(part.training for part in encoder.modules())
        stack = stack_bags([tiles(3, 32, torch.float32)])
        model(stack).logits[:, 0].sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())
        assert any(p.grad.any() for p in model.aggregator.parameters())
        assert [p.requires_grad for p in model.parameters()] == plain
        model.warming_up = False
        model.train()
        assert encoder.training

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"freeze_encoder": True, "lora_rank": 2}, r"--freeze_encoder and --lora_rank must not be given together"),
            ({"freeze_until": "layer3", "lora_rank": 2}, r"--freeze_until and --lora_rank must not"),
            ({"freeze_encoder": True, "freeze_encoder_epochs": 2}, r"not be given with --freeze_encoder_epochs"),
            ({"freeze_encoder_epochs": -1}, r"must be at least 0, got -1"),
            ({"lora_alpha": 0.0}, r"--lora_alpha must be positive"),
            ({"lora_rank": 2, "lora_targets": ()}, r"--lora_targets must name a layer"),
            ({"pretrained": True, "encoder_weights": "x"}, r"--pretrained and --encoder_weights"),
        ],
    )
    def test_settings_that_contradict_each_other_are_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            ModelSettings(**given)


def test_epochs_without_the_encoder_must_leave_some_with_it():
    settings = TrainSettings(model=ModelSettings(freeze_encoder_epochs=8))
    with pytest.raises(ValueError, match=r"less than --num_train_epochs, 8, got 8\. HINT: --freeze_encoder"):
        prepare_run(settings, None)
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_wsi.training.prepare.build_accelerator", lambda *_: accelerator)
        with pytest.raises(ValueError, match=r"must be 0 at ZeRO stage 3.*got 2\. HINT: take stage 2"):
            prepare_run(replace(settings, model=ModelSettings(freeze_encoder_epochs=2)), None)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as timm's hub has them."""
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pretrained = {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.25, 0.3], "input_size": [3, 32, 32], "num_classes": 3}
    pretrained |= {"classifier": "head", "first_conv": "patch_embed.proj"}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": SMALL,
        "pretrained_cfg": pretrained,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model, tmp_path


def assert_loaded(model, source):
    assert (source.architecture, source.options, source.tile_size_px) == ("vit_tiny_patch16_224", SMALL, 32)
    assert (source.mean, source.std) == ((0.7, 0.6, 0.5), (0.2, 0.25, 0.3))
    encoder = build_encoder(source.architecture, source=source.name, tile_size_px=32, **source.options)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in encoder.state_dict().items())


class TestWeights:
    def test_from_a_folder(self, checkpoint):
        model, folder = checkpoint
        source = resolve_encoder(f"local-dir:{folder}")
        assert source.comes_with_weights
        assert_loaded(model, source)

    def test_from_the_hub(self, checkpoint, monkeypatch):
        model, folder = checkpoint
        asked = []

        def download(repo_id, filename, **_):
            asked.append((repo_id, filename))
            return str(folder / filename)

        monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
        assert_loaded(model, resolve_encoder("hf-hub:org/name"))
        assert ("org/name", "config.json") in asked
        assert asked[-1] == ("org/name", "model.safetensors")  # and no pickle

    @pytest.mark.parametrize("name", ["hf-hub:org/none", "local-dir:/none"])
    def test_without_a_network_the_remedy_is_named(self, name):
        with pytest.raises(
            ValueError, match=rf"encoder '{name}' must be downloaded or lie in a folder.*HINT: --encoder_weights"
        ):
            resolve_encoder(name)
        with pytest.raises(ValueError, match=r"must be downloaded.*HINT: --encoder_weights FILE"):
            build_encoder("resnet18", source="resnet18.a1_in1k")

    def test_a_name_that_is_none_of_timms_is_named_before_anything_is_built(self):
        with pytest.raises(ValueError, match=r"timm model's name.*got 'resnet1'. HINT: did you mean resnet18"):
            resolve_encoder("resnet1")
        with pytest.raises(ValueError, match=r"got 'xyzzy'. HINT: timm.list_models\(\)"):
            resolve_encoder("xyzzy")

    def test_a_models_own_normalisation(self):
        assert resolve_encoder("resnet18").mean == (0.485, 0.456, 0.406)
        inception = resolve_encoder("vit_tiny_patch16_224")
        assert (inception.mean, inception.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert not inception.comes_with_weights
        assert inception.tile_size_px is None

    @pytest.mark.parametrize(
        ("name", "millions", "width"),
        [
            ("hf-hub:MahmoodLab/UNI2-h", 681.4, 1536),
            ("hf-hub:prov-gigapath/prov-gigapath", 1135.0, 1536),
            ("hf-hub:paige-ai/Virchow2", 631.2, 2560),
            ("hf-hub:bioptimus/H-optimus-1", 1134.8, 1536),
            ("hf-hub:bioptimus/H0-mini", 85.74, 1536),
            ("hf-hub:1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms", 21.67, 384),
            ("hf-hub:1aurent/vit_large_patch14_reg4_dinov2.kaiko_ai_towards_large_pathology_fms", 304.4, 1024),
            ("hf-hub:1aurent/vit_small_patch16_224.lunit_dino", 21.67, 384),
            ("hf-hub:1aurent/resnet50.lunit_swav", 23.51, 2048),
            ("hf:owkin/phikon", 85.8, 768),
            ("hf:owkin/phikon-v2", 303.35, 1024),
            ("hf:kaiko-ai/midnight", 1134.77, 3072),
        ],
    )
    def test_known_models_have_their_published_sizes(self, name, millions, width):
        source = resolve_encoder(name)
        assert len(KNOWN) == 21
        with torch.device("meta"):
            model = timm.create_model(source.architecture, num_classes=0, **layers_by_name(source.options))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert model.num_features * (2 if source.features == "cls_mean" else 1) == width
        registers = {"UNI2-h": 8, "Virchow2": 4, "H-optimus-0": 4, "H-optimus-1": 4, "H0-mini": 4}
        short = name.split("/")[1]
        prefix = 0 if "resnet" in name else 1 + registers.get(short, 4 * ("reg4" in name))
        assert getattr(model, "num_prefix_tokens", 0) == prefix
        assert source.licence in source.licence_words

    def test_tiles_of_another_kind_are_warned_of(self):
        with logged() as records:
            source = resolve_encoder("hf-hub:mahmoodlab/uni")
            source.warn_of_other_tiles(224, 0.5)
            resolve_encoder("resnet18").warn_of_other_tiles(99, 3.0)
            assert records == []
            source.warn_of_other_tiles(256, 0.25)
        assert records == [
            "hf-hub:MahmoodLab/UNI was trained on tiles of 224 px, got --tile_size_px 256",
            "hf-hub:MahmoodLab/UNI was trained at 0.5 um/px, got --mpp 0.25",
        ]

    def test_a_layer_that_timm_does_not_have_is_named(self):
        with pytest.raises(ValueError, match=r"must be a layer of timm\.layers, got 'Mlpp'"):
            layers_by_name({"mlp_layer": "Mlpp"})
