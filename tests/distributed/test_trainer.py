"""The HF Trainer trains SlideModels as a plain loop does: the mean over all bags of a step, however they lie."""

import pytest
import torch

import trainer_cases as cases
from ds_wsi.engines.hf.models import SlideModelConfig, SlideModelForSlideClassification
from harness import run_ranks

pytestmark = pytest.mark.distributed
LIMIT = 1e-6  # float32, one epoch at learning rate 0.1
ENGINES = ("ddp", "zero0", "zero2", "zero3")
# (engine, kind, accumulation, bags, plain). On two ranks the last steps are: of 13 bags, one, so that a rank has none;
# of 15 by three micro-steps, three, so that a rank has two and the other one.
ONE = [("one", "features", 1, 13, False), ("one", "features", 3, 11, False), ("one", "tiles", 3, 13, False)]
ONE += [("one", "features", 1, 13, True), ("one", "features", 3, 11, True)]
TWO = [(engine, "features", *layout, False) for engine in ENGINES for layout in ((1, 13), (3, 15))]
TWO += [(engine, "tiles", 3, 13, False) for engine in ENGINES]
# The Trainer itself, where Accelerate has nothing to repeat: 16 bags leave a last step of one micro-step of three.
TWO += [("ddp", "features", 3, 16, True), ("zero2", "features", 3, 16, True)]


@pytest.fixture
def _forgotten():
    with cases.quick_collections():
        yield
    cases.forget()


def expected(case, world, wrong=None):
    _, kind, accumulation, n_bags, plain = case
    steps = cases.steps_of(n_bags, world, accumulation, plain=plain)
    return cases.plain_loop(steps, cases.make_bags(kind, n_bags), kind, wrong)


def difference(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.mark.usefixtures("_forgotten")
def test_one_process_is_the_plain_loop():
    for case, state in zip(ONE, cases.train_cases(ONE), strict=True):
        assert difference(state, expected(case, 1)) < LIMIT, case


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    model = SlideModelForSlideClassification(SlideModelConfig.of(cases.CONFIG))
    model.save_pretrained(folder)
    return folder, {name: value.clone() for name, value in model.state_dict().items()}, model.slide_model.mean


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, pretrained):
    return run_ranks(cases.on_rank, 2, TWO, str(tmp_path_factory.mktemp("resume")), str(pretrained[0]))


def test_two_ranks_are_the_plain_loop_under_every_engine(two_ranks):
    for index, case in enumerate(TWO):
        states = [results["trained"][index] for results in two_ranks]
        assert difference(states[0], expected(case, 2)) < LIMIT, case
        parameters = expected(case, 2)
        assert all(torch.equal(states[0][name], states[1][name]) for name in parameters), case


@pytest.mark.usefixtures("_forgotten")
def test_a_mean_of_means_would_be_noticed():
    for case in (TWO[1], TWO[8]):
        assert difference(expected(case, 2, wrong=True), expected(case, 2)) > 100 * LIMIT, case
    # What the Trainer does with a model that does not take its count: 11 bags are [2, 2, 2] and [2, 2, 1].
    trainer = cases.make_trainer("one", cases.make_bags("features", 11), "features", 3, plain=True)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert difference(cases.weights(trainer), expected(ONE[4], 1)) > 100 * LIMIT


def test_every_bag_is_predicted_once_on_two_ranks(two_ranks):
    bags = cases.make_bags("tiles", 7)
    model = cases.make_slide_model("tiles").eval()
    logits = torch.cat([model(cases.stack_bags([bag["tiles"]])).logits for bag in bags])
    for results in two_ranks:
        for predicted in results["predicted"]:
            assert predicted["labels"].tolist() == [bag["labels"] for bag in bags]
            assert (predicted["logits"] - logits).abs().max() < LIMIT


def test_a_resumed_training_is_the_uninterrupted_one_under_zero2_with_a_hook(two_ranks):
    for results in two_ranks:
        results = results["resumed"]
        assert results["stopped_at"] == 3
        assert results["wire_bytes"] > 0
        assert results["own_state"] == 1
        assert difference(results["stopped"], results["whole"]) > 1e-4
        assert difference(results["resumed"], results["whole"]) == 0


@pytest.mark.usefixtures("_forgotten")
def test_a_resumed_training_is_the_uninterrupted_one_in_one_process(tmp_path):
    results = cases.resume_case("one", tmp_path)
    assert difference(results["stopped"], results["whole"]) > 1e-4
    assert difference(results["resumed"], results["whole"]) == 0


def test_weights_are_loaded_into_shards(two_ranks, pretrained):
    _, state, mean = pretrained
    for results in two_ranks:
        assert results["loaded"]["partitioned"]
        loaded = results["loaded"]["state"]
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert torch.equal(loaded["slide_model.mean"], mean)
