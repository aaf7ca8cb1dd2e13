"""A checkpoint of any engine and number of ranks is gone on with by any other: the steps of an uninterrupted run.

Each launch takes many cases. Data are of the step, dealt over the ranks, so that every number of ranks takes the same
steps but for the order of sums.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from resume_cases import EXACT32, EXACT64, ITEMS, STEPS, Runs, distance
from torch import nn

from ds_wsi.training.step import run_micro_step
from harness import run_ranks

pytestmark = pytest.mark.distributed
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def make_model(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.LayerNorm(33), nn.Linear(33, 5, bias=False), nn.Linear(5, 3))
    model[3].weight.requires_grad_(False)
    model.register_buffer("counted", torch.zeros(3))
    return model.to(dtype)


def batch_of(number, dtype):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(ITEMS, 7, generator=generator).to(dtype), torch.randint(0, 3, (ITEMS,), generator=generator)


class Trainer:
    """AdamW, clipped, under an engine of the main job; "zero3-cpu" has its optimizer's states on the host."""

    def __init__(self, engine, dtype=torch.float32, kind="AdamW"):
        from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare
        from ds_wsi.engines.accelerator.scope import forget_engine

        forget_engine()
        stage = int(engine[4]) if engine.startswith("zero") else None
        params = {"lr": "auto", "weight_decay": "auto"} | ({"torch_adam": True} if kind != "SGD" else {})
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "optimizer": {"type": kind, "params": params},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 300, "stage3_param_persistence_threshold": 40},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if engine.endswith("cpu"):
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if engine == "zero3-cpu":
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        settings = EngineSettings(1e-2, 0.01, 0.5, kind.lower(), 1, 1, fsdp=engine == "fsdp2")
        self.accelerator = build_accelerator(settings, Path("unused"), None if stage is None else config)
        self.module, self.dtype = make_model(dtype), dtype
        apart = self.module[0]  # two parameter groups
        self.model, self.optimizer = prepare(self.accelerator, self.module, settings, apart=apart)
        self.saved = 0

    def step(self, number):
        x, y = batch_of(number, self.dtype)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes

        def loss():
            return F.cross_entropy(self.model(x[rank::world]), y[rank::world])

        run_micro_step(self.accelerator, self.model, self.optimizer, loss, 1.0, max_grad_norm=0.5)
        self.module.counted += 1

    def weights(self):
        from ds_wsi.engines.full_state.engine_state import take_state

        taken = take_state(self.accelerator, self.module, self.optimizer)
        return taken.weights | taken.optimizer

    def save(self, folder, step):
        from ds_wsi.engines.full_state.engine_state import take_state
        from ds_wsi.training.checkpoint import Contents, save_checkpoint
        from ds_wsi.training.saver import Saver

        taken = take_state(self.accelerator, self.module, self.optimizer)
        shared = {"model.safetensors": taken.weights, "optimizer.safetensors": taken.optimizer}
        if not self.accelerator.is_main_process:
            assert not taken.weights
            assert not taken.optimizer
            shared = {}
        own_files = {f"own-{self.accelerator.process_index}.safetensors": {"x": torch.ones(2)}}
        with Saver() as saver:
            saver.make_room()
            save_checkpoint(
                saver, self.accelerator, Path(folder), step, Contents({"facts": taken.facts}, shared, own_files), 9
            )

    def load(self, checkpoint):
        from ds_wsi.engines.full_state.engine_state import put_state
        from ds_wsi.runtime.tensor_file import open_tensors

        facts = json.loads((Path(checkpoint) / "state.json").read_text())["facts"]
        with (
            open_tensors(Path(checkpoint) / "model.safetensors") as weights,
            open_tensors(Path(checkpoint) / "optimizer.safetensors") as states,
        ):
            put_state(self.accelerator, self.module, self.optimizer, weights, states, facts)


def case_name(engine, dtype, world):
    return f"{engine}-{str(dtype)[6:]}-{world}"  # zero1-float32-2


def first_runs(cases, folder):
    """Whole runs, each with checkpoints after steps 2 and 3, and the bits of one gone on with in the same place."""
    runs = {}
    for engine, dtype, kind in cases:
        trainer = Trainer(engine, dtype, kind)
        at = Path(folder) / f"{case_name(engine, dtype, trainer.accelerator.num_processes)}-{kind}"
        if trainer.accelerator.is_main_process:
            at.mkdir(exist_ok=True)
        trainer.accelerator.wait_for_everyone()
        for number in range(STEPS):
            trainer.step(number)
            if number + 1 in (2, 3):
                trainer.save(at, number + 1)
        trainer.accelerator.wait_for_everyone()
        whole = trainer.weights()
        again = Trainer(engine, dtype, kind)
        again.load(at / "checkpoint-3")
        for number in range(3, STEPS):
            again.step(number)
        resumed = again.weights()
        runs[at.name] = {
            "whole": whole,
            "same": resumed.keys() == whole.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole),
        }
    return runs


def gone_on(cases, folder):
    """What there is after cases (engine, dtype, kind, checkpoint, its step, step to end with, folder to save in)."""
    weights = {}
    for engine, dtype, kind, source, start, stop, name in cases:
        trainer = Trainer(engine, dtype, kind)
        trainer.load(Path(folder) / source)
        for number in range(start, stop):
            trainer.step(number)
        if stop < STEPS:
            if trainer.accelerator.is_main_process:
                (Path(folder) / name).mkdir(exist_ok=True)
            trainer.accelerator.wait_for_everyone()
            trainer.save(Path(folder) / name, stop)
        trainer.accelerator.wait_for_everyone()
        weights[name] = trainer.weights()
    return weights


CASES = [
    *((engine, torch.float32, "AdamW") for engine in ENGINES),
    ("ddp", torch.float64, "AdamW"),
    ("fsdp2", torch.float64, "AdamW"),
    ("zero2", torch.float32, "SGD"),
    ("zero1-cpu", torch.float32, "AdamW"),
    ("zero3-cpu", torch.float32, "AdamW"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(first_runs, 2, CASES, folder)[0]


def test_the_same_place_goes_on_bit_by_bit(two):
    for name, outcome in two.items():
        assert outcome["same"], name


def test_two_one_and_four_ranks_under_every_engine(two, folder):
    """2 -> 1 -> 4, each engine by itself, and from each to another."""
    others = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
    one, four = [], []
    for engine, dtype, kind in CASES:
        source = f"{case_name(engine, dtype, 2)}-{kind}"
        alone = {"fsdp2": "ddp"}.get(engine, engine)  # FSDP2 has nothing to share with nobody
        one.append((alone, dtype, kind, f"{source}/checkpoint-2", 2, 4, f"{source}-1"))
        four.append((engine, dtype, kind, f"{source}-1/checkpoint-4", 4, STEPS, f"{source} itself"))
        if engine in ENGINES and dtype == torch.float32 and kind == "AdamW":
            four.append((others[engine], dtype, kind, f"{source}/checkpoint-3", 3, STEPS, f"{source} {others[engine]}"))
    run_ranks(gone_on, 1, one, folder)
    ends = run_ranks(gone_on, 4, four, folder)[0]
    for name, state in ends.items():
        whole = two[name.split()[0]]["whole"]
        limit = EXACT64 if "float64" in name else EXACT32
        assert distance(state, whole) < (limit,), (name, distance(state, whole))


def deepspeeds_own(folder):
    """Whether each stage's own files load with tensors alone, and what is said of a stranger's in each place."""
    from ds_wsi.engines.hf.deepspeed_files import tensors_alone

    by_stage = {}
    for stage in range(4):
        first = Trainer(f"zero{stage}")
        first.step(0)
        stage_folder = Path(folder) / str(stage)
        first.model.save_checkpoint(str(stage_folder), tag="t")
        weights = first.weights()
        second = Trainer(f"zero{stage}")
        with tensors_alone():
            second.model.load_checkpoint(str(stage_folder), tag="t")
        again = second.weights()
        said = []
        for path in sorted((stage_folder / "t").rglob("*.pt")):
            kept = path.read_bytes()
            torch.save({"module": Runs(Path(folder) / "it ran")}, path)
            try:
                with tensors_alone():
                    second.model.load_checkpoint(str(stage_folder), tag="t")
            except ValueError as error:
                said.append(str(error))
            path.write_bytes(kept)
        by_stage[stage] = (all(torch.equal(weights[name], again[name]) for name in weights), said)
    return by_stage


def test_deepspeeds_own_files_are_read_without_running_what_is_in_them(tmp_path):
    (by_stage,) = run_ranks(deepspeeds_own, 1, str(tmp_path))
    for stage, (same, said) in by_stage.items():
        assert same, stage
        assert len(said) == (2 if stage else 1), said
        assert all("tensors and DeepSpeed's records alone" in words for words in said)
    assert not (tmp_path / "it ran").exists()


def failing(folder):
    """What each rank says where the second one's disk is full."""
    from ds_wsi.training import checkpoint

    trainer = Trainer("ddp")

    def full(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    if trainer.accelerator.process_index == 1:
        checkpoint.write_tensors = full
    try:
        trainer.save(folder, 1)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error} {error.__notes__}"
    return "nothing was raised"


def test_a_full_disk_of_one_rank_is_told_by_both(tmp_path):
    first, second = run_ranks(failing, 2, str(tmp_path))
    for said in (first, second):
        assert f"DiskFullError: {tmp_path}" in said
        assert "must have room for what is written" in said
        assert "checkpoint-1" in said
    assert not list(tmp_path.iterdir()), "nothing half-written is left"
