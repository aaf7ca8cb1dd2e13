"""Encoders and aggregators of the user's own code: what is built, what is refused, and that no file has it imported."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from logs import logged
from own_code import CODE
from tiny_runs import evaluate, train, write_cohort

import ds_wsi
from ds_wsi.cli import main
from ds_wsi.models import ModelConfig, build_aggregator, build_encoder, build_model, load_model, save_model
from ds_wsi.models.hub import resolve_encoder
from ds_wsi.models.own import is_code
from ds_wsi.slides.demo import DemoPolicy, make_demo
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags
from ds_wsi.training.options import settings_from


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a module of own code that notes when it is imported; `forget` it afterwards."""
    before = list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(CODE)
    yield tmp_path
    forget()
    sys.path[:] = before


def forget():
    for name in ("my_models", "evil_models"):
        sys.modules.pop(name, None)


def was_imported(place, name="my_models"):
    return (place / f"{name}.imported").exists()


def again(place):
    """Forget what was imported, as a new process has it."""
    forget()
    (place / "my_models.imported").unlink(missing_ok=True)


TILING = asdict(TilingPolicy(tile_size_px=32))
CONFIG = ModelConfig("my_models:Net", "my_models:Mean", ("a", "b"), TILING, encoder_options={"width": 6})


def test_names_of_code_are_no_names_of_places():
    assert all(map(is_code, ("m:f", "a.b:C", "_m1:_f")))
    assert not any(map(is_code, ("hf-hub:ORG/NAME", "local-dir:x", "local-dir:/x", "resnet18", "m:", ":f", "m:f.g")))
    assert not is_code("m:f\n")


def test_a_folder_of_a_strangers_has_nothing_imported(place):
    """Through every way in; the folder names a module that is there and would do harm."""
    (place / "evil_models.py").write_text(CODE)
    write_cohort(place / "data")
    folder = place / "run"
    for config in (
        replace(CONFIG, encoder="evil_models:Net"),
        replace(CONFIG, encoder="resnet10t", encoder_options={}, aggregator="evil_models:Mean"),
        ModelConfig(None, "evil_models:Mean", ("normal", "tumor"), in_dim=8),
    ):
        save_model(folder, config, {})
        refused = r"'evil_models:\w+' must be allowed by you .*config.json\). HINT: --allow_code evil_models"
        with pytest.raises(ValueError, match=refused):
            load_model(folder)
        with pytest.raises(ValueError, match=refused):
            load_model(folder, allow_code=["my_models", "evil", "evil_models:Other"])
        with pytest.raises(ValueError, match=r"a ModelConfig\). HINT"):
            build_model(ModelConfig.read(folder / "config.json"))
        with pytest.raises(ValueError, match=refused):
            ds_wsi.SlideModelForSlideClassification.from_run(folder)
        held = ds_wsi.SlideModelConfig.of(config)
        held.allow_code = ["evil_models"]  # a file's own word is none
        with pytest.raises(ValueError, match="must be allowed by you"):
            ds_wsi.SlideModelForSlideClassification(held)
        held.save_pretrained(place / "hf")
        (place / "hf" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match="must be allowed by you"):
            ds_wsi.SlideModelForSlideClassification.from_pretrained(place / "hf")
        for command in (["features"], ["evaluate"], ["heatmap"]):
            options = ["--model", folder, "--manifest", place / "data" / "m.csv", "--output_dir", place / "out"]
            with logged() as lines:
                assert main([*command, *map(str, options)]) == 2
            assert "HINT: --allow_code evil_models" in lines[-1], lines
    assert not was_imported(place, "evil_models")
    assert "evil_models" not in sys.modules


@pytest.mark.usefixtures("place")
def test_one_word_is_one_module_and_no_set_of_letters():
    with pytest.raises(ValueError, match="'m:Net' must be allowed"):
        build_model(replace(CONFIG, encoder="m:Net"), allow_code="my_models")
    assert build_model(CONFIG, allow_code="my_models").encoder.num_features == 6


def test_a_yaml_of_a_strangers_has_nothing_imported(place, parsed):
    (place / "s.yaml").write_text("encoder: my_models:Net\naggregator: my_models:Mean\n")
    with pytest.raises(ValueError, match=r"encoder 'my_models:Net' must be allowed .*s.yaml"):
        parsed("--config", "s.yaml")
    with pytest.raises(ValueError, match=r"aggregator 'my_models:Mean' must be allowed"):
        parsed("--config", "s.yaml", "--encoder", "my_models:Net")
    (place / "all.yaml").write_text("aggregator: my_models:Mean\nallow_code: my_models\n")
    with pytest.raises(ValueError, match=r"allow_code must be given on the command line"):
        parsed("--config", "all.yaml")
    assert not was_imported(place)
    settings = parsed("--config", "s.yaml", "--allow_code", "my_models")
    assert (settings.model.encoder, settings.model.aggregator) == ("my_models:Net", "my_models:Mean")
    given = ("--encoder", "my_models:Net", "--aggregator", "my_models:Mean")
    assert parsed("--config", "s.yaml", *given).model.aggregator == "my_models:Mean"


@pytest.fixture
def parsed():
    from ds_wsi.cli import build_parser

    return lambda *words: settings_from(build_parser("train").parse_args(["train", *words]))[0]


def test_what_is_allowed_is_built_with_its_options_size_and_normalisation(place):
    model = build_model(CONFIG, allow_code=["my_models"])
    assert model.encoder.num_features == model.aggregator.last.in_features == 6
    assert model.encoder.tile_size_px == 32
    again(place)
    assert isinstance(build_encoder("my_models:Net", width=5), torch.nn.Module)  # a call is its user's word
    source = resolve_encoder("my_models:Net", {"width": 6})
    assert (source.mean, source.std, source.options) == ((0.5,) * 3, (0.25,) * 3, {"width": 6})
    assert resolve_encoder("my_models:Map").mean == (0.5, 0.5, 0.5)
    assert resolve_encoder("my_models:Colour").mean == (0.485, 0.456, 0.406)
    assert build_encoder("my_models:Colour").num_features == 3  # without a parameter


def test_a_model_is_rebuilt_to_the_same_bits_by_folder_and_by_transformers(place):
    torch.manual_seed(0)
    model = build_model(replace(CONFIG, aggregator_options={"scale": 2.0}), allow_code=["my_models"]).eval()
    bags = stack_bags([torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (3, 2)])
    expected = model(bags).logits
    config = replace(CONFIG, aggregator_options={"scale": 2.0})
    save_model(place / "run", config, model.state_dict())
    again(place)
    loaded, read = load_model(place / "run", allow_code=["my_models:Net", "my_models:Mean"])
    assert (read.own_code, read.encoder_options) == (config.own_code, config.encoder_options)
    assert torch.equal(loaded(bags).logits, expected)
    hf_model = ds_wsi.SlideModelForSlideClassification.from_run(place / "run", allow_code=["my_models"])
    hf_model.save_pretrained(place / "hf")
    again(place)
    hf_model = ds_wsi.SlideModelForSlideClassification.from_pretrained(place / "hf", allow_code=["my_models"])
    assert torch.equal(hf_model.eval()(*bags).logits, expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_models:Nut", {}, r"must name a class or function of my_models, got 'my_models:Nut' .*did you mean Net\?"),
        ("my_models:number", {}, "must name a class or function"),
        ("my_models:system", {"command": "true"}, r"must be defined in the package .* is of posix"),
        ("no_models:Net", {}, r"there is no no_models \(.*\)\. HINT: PYTHONPATH=FOLDER"),
        ("my_models:Net", {"depth": 3}, "options of my_models:Net must be of width, got 'depth'"),
        ("my_models:needs", {}, "must hold path, which has no default"),
        ("my_models:fails", {}, "must be built from no options, got TypeError: no such thing"),
        ("my_models:no_module", {}, r"must return a torch\.nn\.Module, got int"),
        ("my_models:Map", {}, r"must return features \[N, D\], got \[1, 8, 8, 8\]"),
        ("my_models:Pair", {}, "must return a tensor for tiles, got tuple"),
        ("my_models:Wrong", {}, "num_features of my_models:Wrong must be the width of its features, 8, got 9"),
        ("my_models:Grey", {}, "std of my_models:Grey must be positive"),
    ],
)
@pytest.mark.usefixtures("place")
def test_an_encoder_that_is_none_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(resolve_encoder(name, options).architecture, tile_size_px=32, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_models:MeanOfAll", {}, r"must compute each bag of a stack by itself, got logits that differ by [\d.]+"),
        ("my_models:OneLogit", {}, r"must be \[B, C\], \[2, 3\] for 2 bags, got \[2, 1\]"),
        ("my_models:Logits", {}, r"must return a ds_wsi\.SlideOutput, got Tensor"),
        ("my_models:BagAttention", {}, r"attention of .* of 5 rows, got \[2\]"),
        ("my_models:Nothing", {}, "must have parameters"),
        ("my_models:Net", {}, r"my_models:Net must take a StackedBags of features \[5, 4\], got TypeError"),
        ("my_models:Mean", {"heads": 2}, "must be of scale, dropout, got 'heads'"),
    ],
)
@pytest.mark.usefixtures("place")
def test_an_aggregator_that_is_none_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_aggregator(name, 4, 3, **options)


@pytest.mark.usefixtures("place")
def test_the_trial_of_an_aggregator_leaves_no_trace():
    torch.manual_seed(3)
    built = build_aggregator("my_models:Mean", 4, 3)
    after = torch.rand(3)
    torch.manual_seed(3)
    plain = torch.nn.Linear(4, 3)
    assert torch.equal(built.last.weight, plain.weight)
    assert torch.equal(torch.rand(3), after)
    assert built.training


def write_package(folder):
    """An installed package, as importlib.metadata sees it."""
    (folder / "plug.py").write_text(CODE)
    info = folder / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    groups = "[ds_wsi.encoders]\nplug_net = plug:Net\n[ds_wsi.aggregators]\nplug_mean = plug:Mean\nabmil = plug:Mean\n"
    (info / "entry_points.txt").write_text(groups)


def test_names_of_installed_packages(place, monkeypatch, capsys):
    write_package(place)
    monkeypatch.syspath_prepend(str(place))
    config = replace(CONFIG, encoder="plug_net", aggregator="plug_mean")
    save_model(place / "run", config, {})
    with pytest.raises(ValueError, match=r"'plug_net' must be allowed .* module plug .* HINT: --allow_code plug"):
        load_model(place / "run")
    with pytest.raises(SystemExit):
        main(["train", "--aggregator", "plug_man"])
    assert "did you mean plug_mean?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"gated_abmil, .*abmilx, plug_mean.*, or MODULE:CLASS"):
        build_aggregator("nothing", 3, 2)
    with pytest.raises(ValueError, match=r"or of installed packages plug_net, got 'no_net'"):
        build_encoder("no_net")
    assert not was_imported(place, "plug")
    assert type(build_aggregator("abmil", 3, 2)).__module__.startswith("ds_wsi.")  # ours goes before
    assert not was_imported(place, "plug")
    for allowed in (["plug"], ["plug_net", "plug_mean"]):
        assert type(build_model(config, allow_code=allowed).encoder).__module__ == "plug"


def test_a_run_on_features_goes_on_and_is_evaluated(place):
    data = write_cohort(place / "data")
    given = ("--aggregator", "my_models:Mean", "--aggregator_options", "scale=2.0")
    constant = ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    assert train(data, place / "parts", *given, *constant, epochs=1) == 0
    assert train(data, place / "parts", *given, *constant, "--resume_from_checkpoint", epochs=2) == 0
    assert train(data, place / "one", *given, *constant, epochs=2) == 0
    # The command line's own word is enough, and config.json has name and options.
    held = json.loads((place / "one" / "config.json").read_text())
    assert (held["aggregator"], held["aggregator_options"]) == ("my_models:Mean", {"scale": 2.0})
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("parts", "one")]
    assert weights[0] == weights[1]
    (place / "my_models.py").write_text(CODE + "\nnumber = 4\n")
    again(place)
    with logged() as lines:
        assert train(data, place / "parts", *given, *constant, "--resume_from_checkpoint", epochs=3) == 2
    assert "own_code must be the checkpoint's" in lines[-1]
    again(place)
    (place / "s.yaml").write_text("aggregator: my_models:Mean\n")
    allowed = ("--config", place / "s.yaml", "--allow_code", "my_models", "--aggregator_options", "scale=2.0")
    assert (
        main(
            [
                str(word)
                for word in (
                    "train",
                    "--dry_run",
                    "--features_dir",
                    data / "features",
                    "--manifest",
                    data / "m.csv",
                    *allowed,
                )
            ]
        )
        == 0
    )
    again(place)
    assert evaluate(data, place / "one", place / "out") == 2
    assert not was_imported(place)
    assert evaluate(data, place / "one", place / "out", "--allow_code", "my_models") == 0
    assert (place / "out" / "metrics.json").is_file()


def test_an_encoder_of_own_code_from_slides_to_heat_maps(place):
    policy = DemoPolicy(train=2, validation=2, test=2, min_side_px=352, max_side_px=352)
    manifest = make_demo(place / "slides", policy)
    given = {"--encoder": "my_models:Net", "--encoder_options": "width=6", "--tile_size_px": "64", "--heatmaps": "0"}
    given |= {"--manifest": manifest, "--num_train_epochs": "1", "--dataloader_num_workers": "0", "--output_dir": "run"}
    words = [str(word) for pair in given.items() for word in pair]
    with logged() as lines:
        assert main(["train", *words]) == 0
        assert main(["train", *words[:-1], "no", "--pretrained"]) == 2
    assert f"own code: my_models:Net, of {place / 'my_models.py'}" in lines
    assert not any("RANDOM" in line for line in lines)
    assert "--pretrained must be given with a timm model's name" in lines[-1]
    assert json.loads((place / "run" / "config.json").read_text())["mean"] == [0.5, 0.5, 0.5]
    again(place)
    common = ["--model", "run", "--manifest", str(manifest), "--dataloader_num_workers", "0", "--device", "cpu"]
    allow = ["--allow_code", "my_models"]
    for command, more in (("evaluate", ["--output_dir", "e"]), ("heatmap", ["--output_dir", "h"])):
        assert main([command, *common, *more, *allow]) == 0
    assert main(["features", *common, "--output_dir", "f", *allow]) == 0
    direct = ["features", "--encoder", "my_models:Net", "--encoder_options", "width=6", "--tile_size_px", "64"]
    assert main([*direct, *common[2:], "--output_dir", "d"]) == 0
    assert len(list((place / "d").glob("*.safetensors"))) == len(list((place / "f").glob("*.safetensors"))) == 6
    assert len(list((place / "h").glob("*.png"))) == 6


@pytest.mark.usefixtures("place")
def test_the_partition_checks_it_as_any(parsed):
    settings = parsed("--encoder", "my_models:Net", "--encoder_options", "width=4")
    assert settings.model.encoder_options == (("width", 4),)
    assert ds_wsi.check_partition(build_encoder("my_models:Net"), torch.randn(3, 3, 32, 32)).exact


def test_options_of_an_encoder_are_of_own_code_alone():
    with pytest.raises(ValueError, match=r"--encoder_options must be given with an encoder of your own"):
        resolve_encoder("resnet18", {"width": 3})
