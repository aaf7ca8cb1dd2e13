"""`ds_wsi.initialize` on two ranks: DeepSpeed's arguments, "auto" filled, the section followed or refused by name."""

import argparse
import base64
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from harness import run_ranks

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "torch_adam": True},
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": "auto",
        "offload_optimizer": {"device": "auto"},
    },
    "zero_force_ds_cpu_optimizer": False,
}
PLAIN = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "ds_wsi": {"compression": {"hook": "topk", "keep": 0.5}},
}
BASE = {key: value for key, value in PLAIN.items() if key != "ds_wsi"}


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))


def make_slide_model():
    from ds_wsi import SlideModel, build_aggregator, build_encoder

    torch.manual_seed(0)
    encoder = build_encoder("test_resnet")
    return SlideModel(encoder, build_aggregator("abmil", encoder.num_features, 2))


def first_error(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def step(engine):
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.randn(4, 7, generator=generator), torch.randint(0, 3, (4,), generator=generator)
    engine.backward(F.cross_entropy(engine(x), y))
    engine.step()


def the_readmes_line():
    """README's line, and the file of its own that it names: every value "auto" but the optimizer's kind."""
    import ds_wsi

    engine, optimizer, loader, schedule = ds_wsi.initialize(
        model=make_model(), config=str(ROOT / "ds_configs/dmgc.json")
    )
    step(engine)
    return {
        "handle": (engine.comm_handle.name, engine.comm_handle.where, engine.comm_handle.state.policy.keep),
        "batch": (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()),
        "lr": engine.get_lr(),
        "rest": (optimizer is engine.optimizer, loader, schedule),
    }


def by_place(parameters):
    """Every parameter of DeepSpeed's, by its place."""
    import ds_wsi

    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    data = torch.utils.data.TensorDataset(torch.randn(8, 7), torch.zeros(8, dtype=torch.long))
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1)
    given = {
        "args": argparse.Namespace(local_rank=dist.get_rank()),
        "model": model,
        "optimizer": sgd,
        "model_parameters": list(model.parameters()),
        "training_data": data,
        "lr_scheduler": schedule,
        "distributed_port": 29501,
        "mpu": None,
        "dist_init_required": None,
        "collate_fn": torch.utils.data.default_collate,
        "config": PLAIN,
        "mesh_param": None,
        "config_params": None,
    }
    assert set(given) >= set(parameters), "DeepSpeed has a parameter that this test does not know"
    engine, _, loader, schedule = ds_wsi.initialize(*(given[name] for name in parameters))
    return engine.get_lr(), len(next(iter(loader))[0]), schedule is not None, engine.comm_handle.name


def other_ways_to_a_config():
    import ds_wsi

    hooks = {}
    encoded = base64.urlsafe_b64encode(json.dumps(PLAIN).encode()).decode()
    for name, more in (
        ("params", {"config_params": PLAIN}),
        ("args", {"args": argparse.Namespace(deepspeed_config=PLAIN)}),
        ("base64", {"config": encoded}),
    ):
        model = make_model()
        engine, *_ = ds_wsi.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **more)
        hooks[name] = engine.comm_handle.name
    return hooks


def filled():
    """Whether our engine without a section is DeepSpeed's own, with "auto" filled: compared number by number."""
    import deepspeed

    import ds_wsi
    from ds_wsi.engines.sharded.zero import full_state_dict

    engine, *_ = ds_wsi.initialize(model=make_model(), config=AUTO)
    step(engine)
    numbers = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 1e-4, "torch_adam": True}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 33 * 33,
            "stage3_prefetch_bucket_size": int(0.9 * 33 * 33),
            "stage3_param_persistence_threshold": 330,
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    native, *_ = deepspeed.initialize(model=make_model(), config=numbers)
    step(native)
    one, two = full_state_dict(engine.module), full_state_dict(native.module)
    return all(torch.equal(one[name], two[name]) for name in two), engine.comm_handle is None


def begin(section, model=None):
    import ds_wsi

    model = model or make_slide_model()
    return ds_wsi.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=BASE | {"ds_wsi": section}
    )[0]


def followed():
    """What became of the section's keys beside compression."""
    import ds_wsi
    from ds_wsi.partition.forward import PartitionedForward

    engine = begin(
        {
            "partition": {"mode": "recompute", "chunk_size": 2},
            "norm": {"training": "stack", "evaluation": "running"},
            "stacking": {"pack_bytes": 4096},
        }
    )
    bags = ds_wsi.stack_bags([torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (3, 2)])
    engine.backward(engine(bags).logits.logsumexp(1).sum())
    engine.step()
    return (
        type(engine.module.encoder.forward) is PartitionedForward,
        engine.module.norm_training,
        type(engine.module.aggregator.forward).__name__,
    )


def refused_sections():
    import ds_wsi

    errors = {}
    for name, section in SECTIONS.items():
        errors[f"section {name}"] = first_error(lambda section=section: begin(section))
    errors["section of a plain model"] = first_error(
        lambda: begin({"norm": {"training": "step"}}, torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    )
    halves = {"bf16": {"enabled": True}}
    for name, more in (("a section", {"ds_wsi": {"compression": {"hook": "none"}}}), ("no section", {})):
        config = BASE | halves | more
        errors[f"bf16, {name}"] = first_error(
            lambda config=config: ds_wsi.initialize(model=make_slide_model(), config=config)
        )
    return errors


def attached():
    """`attach` on an engine that is there."""
    import deepspeed

    import ds_wsi

    answers = {}
    for name, section in {
        "partition": {"partition": {"mode": "lean"}},
        "norm": {"norm": {"training": "stack"}},
    }.items():
        model = make_slide_model()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=BASE | {"ds_wsi": section}
        )
        answers[f"attach {name}"] = first_error(lambda engine=engine: ds_wsi.attach(engine))
    answers["attach without a section"] = ds_wsi.attach(torch.nn.parallel.DistributedDataParallel(make_model())) is None
    answers["attach bare"] = first_error(lambda: ds_wsi.attach(make_model()))
    return answers


def refused_arguments():
    import ds_wsi

    return {
        "argument": first_error(lambda: ds_wsi.initialize(model=make_model(), confg={})),
        "two": first_error(lambda: ds_wsi.initialize(model=make_model(), config={}, config_params={})),
        "none": first_error(lambda: ds_wsi.initialize(model=make_model())),
        "file": first_error(lambda: ds_wsi.initialize(model=make_model(), config="no/such.json")),
        "model": first_error(lambda: ds_wsi.initialize(config=PLAIN)),
    }


def initialized():
    import deepspeed

    parameters = list(inspect.signature(deepspeed.initialize).parameters)
    return {
        "dmgc": the_readmes_line(),
        "by place": by_place(parameters),
        "unchanged": PLAIN["zero_optimization"] == {"stage": 1},
        **other_ways_to_a_config(),
        "auto": filled(),
        "followed": followed(),
        **refused_sections(),
        "norms": {name: norms_chosen(*case) for name, case in NORMS.items()},
        **attached(),
        **refused_arguments(),
    }


def norms_chosen(section, micro_steps, pair):
    """What a SlideModel's norms average over once `initialize` has had it; `pair` None: nobody had said anything."""
    import ds_wsi

    model = make_slide_model()
    if pair == "frozen":
        model.encoder.requires_grad_(False)
    elif pair is not None:
        model.set_norms(*pair[:2]).norms_from = pair[2]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
    }
    ds_wsi.initialize(model=model, config=config if section is None else config | {"ds_wsi": section})
    return model.norm_training, model.norm_evaluation


RUN = ("step", "bag", "config.json")
# Section, micro-steps, what was said of the model before; and what is then so.
NORMS = {
    "no section": (None, 1, None),
    "no section, accumulation": (None, 4, None),
    "no norm": ({"compression": {"hook": "none"}}, 1, None),
    "no norm, accumulation": ({"compression": {"hook": "none"}}, 4, None),
    "auto, accumulation": ({"norm": {}}, 4, None),
    "a frozen encoder": ({"norm": {"training": "stack"}}, 1, "frozen"),
    "its own": (None, 1, ("bag", "running", "set_norms")),
    "a run's": ({"compression": {"hook": "none"}}, 1, RUN),
    "a run's, auto": ({"norm": {}}, 1, RUN),
    "a run's, no section": (None, 1, RUN),
}
CHOSEN = {
    **dict.fromkeys(("no section", "no norm"), ("step", "running")),  # of two bags, one per rank
    **dict.fromkeys(("no section, accumulation", "no norm, accumulation", "auto, accumulation"), ("stack", "bag")),
    "a frozen encoder": ("frozen", "running"),
    "its own": ("bag", "running"),
    **dict.fromkeys(("a run's", "a run's, auto", "a run's, no section"), ("step", "bag")),
}
SECTIONS = {
    "tiling": {"tiling": {"tile_size_px": 64}},
    "reading": {"reading": {"workers": 3}},
    "augment": {"augment": {"colour": 0.3}},
    "stacking.bags_per_step": {"stacking": {"bags_per_step": 8}},
    "tile_parallel.size": {"tile_parallel": {"size": 2}},
    "norm.evaluation": {"norm": {"evaluation": "recalibrated"}},
    "norm.recalibration_tiles": {"norm": {"recalibration_tiles": 4}},
    "comm": {"comm": {"hook": "dmgc"}},
    "compression.hok": {"compression": {"hok": "dmgc"}},
}


def test_initialize():
    for results in run_ranks(initialized, 2):
        handle, batch = results["dmgc"]["handle"], results["dmgc"]["batch"]
        assert handle == ("dmgc", "zero1", 0.01)
        assert batch == (1, 1)
        assert results["dmgc"]["lr"] == [3e-4]
        assert results["dmgc"]["rest"] == (True, None, None)
        assert results["by place"] == ([0.5], 2, True, "topk")
        assert results["unchanged"]
        assert [results[name] for name in ("params", "args", "base64")] == ["topk"] * 3
        assert results["auto"] == (True, True)
        assert results["followed"] == (True, "stack", "PackedForward")
        for name in SECTIONS:
            words = results[f"section {name}"]
            assert words.startswith(f"ValueError: ds_wsi.{name}"), words
            assert "HINT" in words
        assert results["norms"] == CHOSEN
        for name in ("a section", "no section"):
            assert "bf16 must be off for BatchNorm" in results[f"bf16, {name}"], results[f"bf16, {name}"]
        assert "ds_wsi.norm must be given with a SlideModel" in results["section of a plain model"]
        for name in ("partition", "norm"):
            assert f"ds_wsi.{name}" in results[f"attach {name}"]
            assert "before" in results[f"attach {name}"]
            assert "HINT: ds_wsi.initialize does it" in results[f"attach {name}"]
        assert results["attach without a section"]
        assert "got Sequential on 2 processes. HINT: DistributedDataParallel(model)" in results["attach bare"]
        assert results["argument"].startswith("TypeError: got an unexpected keyword argument 'confg'")
        assert "got config, config_params" in results["two"]
        assert "got none. HINT: config=" in results["none"]
        assert "no/such.json (missing)" in results["file"]
        assert "model must be given" in results["model"]
