"""Features that stay in memory: the bags are those of the files, and what was changed is read again."""

import pickle
from pathlib import Path

import pytest
import torch

from ds_wsi.bags.bag import BagPart, FailureLog, read_bags
from ds_wsi.bags.feature_memory import FeatureMemory
from ds_wsi.bags.features import FeatureFile, write_features
from ds_wsi.bags.joined import GridPart, JoinedGrid
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy

LENGTHS = (3, 5, 4)
WIDTH = 8


def write(folder, shift=0.0):
    bags = [torch.arange(n * WIDTH).float().reshape(n, WIDTH) + 100 * index + shift for index, n in enumerate(LENGTHS)]
    for index, bag in enumerate(bags):
        write_features(folder / f"s{index}.safetensors", bag, torch.zeros(len(bag), 2).long(), 1.0, {})
    return bags


def cohort(folder, memory):
    slides = [SlideEntry(f"s{index}", folder / f"s{index}.safetensors", 0, "") for index in range(len(LENGTHS))]
    files = [
        FeatureFile(s.slide_id, s.path, n, WIDTH, 0, 0, None, memory) for s, n in zip(slides, LENGTHS, strict=True)
    ]
    return slides, files


def bags_of(folder, memory, order, workers):
    slides, files = cohort(folder, memory)
    log = FailureLog(slides, files, 0.0)
    return [(bag.slide, bag.tiles, bag.kept) for bag in read_bags(slides, files, order, ReadPolicy(workers), log)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_pass_takes_the_same_bags_without_the_files(workers, tmp_path):
    expected = write(tmp_path)
    memory = FeatureMemory(2**20)
    order = [2, 0, 1, BagPart(1, 1, 4), BagPart(0, 0, 2, (2, 0))]
    first = bags_of(tmp_path, memory, order, workers)
    for path in tmp_path.glob("*"):
        path.unlink()
    for bags in (first, bags_of(tmp_path, memory, order, workers)):
        assert [slide for slide, _, _ in bags] == [2, 0, 1, 1, 0]
        rows = [range(4), range(3), range(5), range(1, 4), (2, 0)]
        for (slide, tiles, kept), asked in zip(bags, rows, strict=True):
            assert kept.tolist() == list(asked)
            assert torch.equal(tiles, expected[slide][list(asked)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bag_of_several_files_is_kept_file_by_file(workers, tmp_path):
    expected = write(tmp_path)
    memory = FeatureMemory(2**20)
    slides, files = cohort(tmp_path, memory)
    joined = [JoinedGrid(tuple(GridPart(slides[row], files[row], row) for row in (0, 2)))]

    def bags(order):
        log = FailureLog(slides, joined, 0.0)
        return [bag.tiles for bag in read_bags(slides, joined, order, ReadPolicy(workers), log)]

    bags([0])
    (tmp_path / "s0.safetensors").unlink()
    (tmp_path / "s2.safetensors").unlink()
    assert torch.equal(bags([0])[0], torch.cat([expected[0], expected[2]]))
    assert torch.equal(bags([BagPart(0, 0, 3, (1, 4, 6))])[0], torch.cat([expected[0], expected[2]])[[1, 4, 6]])
    assert memory.get(tmp_path / "s2.safetensors") is not None


def test_without_memory_or_beyond_its_bound_files_are_read_each_time(tmp_path):
    write(tmp_path)
    bytes_of_two = 4 * WIDTH * (LENGTHS[0] + LENGTHS[2])
    for memory, from_memory in ((None, ()), (FeatureMemory(0), ()), (FeatureMemory(bytes_of_two), (0, 2))):
        old = write(tmp_path)
        bags_of(tmp_path, memory, [0, 1, 2], 0)
        new = write(tmp_path, shift=0.5)
        for slide, tiles, _ in bags_of(tmp_path, memory, [0, 1, 2], 0):
            assert torch.equal(tiles, (old if slide in from_memory else new)[slide])


@pytest.mark.parametrize("inference", [False, True])
def test_features_that_were_written_to_are_read_again(inference, tmp_path):
    expected = write(tmp_path)
    memory = FeatureMemory(2**20)
    bags_of(tmp_path, memory, [0, 1], 0)
    with torch.inference_mode(inference):
        memory.get(tmp_path / "s1.safetensors")[:1].add_(1)  # a view of them
    assert memory.get(tmp_path / "s1.safetensors") is None
    assert torch.equal(memory.get(tmp_path / "s0.safetensors"), expected[0])
    assert torch.equal(bags_of(tmp_path, memory, [1], 0)[0][1], expected[1])


def test_what_inference_mode_made_is_not_kept_and_another_process_starts_with_nothing():
    memory = FeatureMemory(2**20)
    with torch.inference_mode():
        memory.keep(Path("made"), torch.zeros(2, 2))
    memory.keep(Path("plain"), torch.zeros(2, 2))
    assert memory.get(Path("made")) is None
    assert memory.get(Path("plain")) is not None
    assert pickle.loads(pickle.dumps(memory)).get(Path("plain")) is None
