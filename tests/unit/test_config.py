import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.config import DsWsiConfig, read_section, write_section
from ds_wsi.slides.policy import TilingPolicy


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")), ids=lambda p: p.stem
)
def test_every_config_of_the_project_is_read(path):
    section = json.loads(path.read_text())["ds_wsi"]
    assert read_section(section) == read_section(json.loads(json.dumps(write_section(read_section(section)))))


def test_an_empty_section_is_the_defaults():
    assert read_section({}) == DsWsiConfig()
    assert read_section({"tiling": {}}) == DsWsiConfig()


@given(
    size=st.integers(1, 2048),
    mpp=st.floats(0.05, 10),
    grey=st.tuples(st.integers(0, 100), st.integers(100, 255)),
    workers=st.integers(0, 64),
    colour=st.floats(0, 0.99),
    flips=st.booleans(),
)
def test_what_is_written_is_read_through_json(size, mpp, grey, workers, colour, flips):
    config = DsWsiConfig(
        TilingPolicy(size, mpp, grey_range=grey), ReadPolicy(workers=workers), AugmentPolicy(flips, colour)
    )
    assert read_section(json.loads(json.dumps(write_section(config)))) == config


def test_whole_numbers_serve_as_floats():
    config = read_section({"tiling": {"mpp": 1, "min_tissue_fraction": 0}})
    assert config.tiling.mpp == 1.0
    assert isinstance(config.tiling.mpp, float)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tilling": {}}, r"^ds_wsi\.tilling must be one of tiling, reading, augment, partition"),
        (
            {"tiling": {"tile_size": 64}},
            r"^ds_wsi\.tiling\.tile_size must be one of tile_size_px, mpp, min_tissue_fraction",
        ),
        ({"tiling": 64}, r"^ds_wsi\.tiling must be an object, got 64"),
        ({"tiling": None}, r"^ds_wsi\.tiling must be an object"),
        ({"tiling": {"tile_size_px": "64"}}, r"^ds_wsi\.tiling\.tile_size_px must be of type int, got '64'"),
        ({"tiling": {"tile_size_px": 64.5}}, r"^ds_wsi\.tiling\.tile_size_px must be of type int, got 64\.5"),
        ({"tiling": {"tile_size_px": True}}, r"^ds_wsi\.tiling\.tile_size_px must be of type int"),
        ({"tiling": {"mpp": True}}, r"^ds_wsi\.tiling\.mpp must be of type float"),
        ({"tiling": {"mpp": "auto"}}, r"^ds_wsi\.tiling\.mpp must be of type float, got 'auto'"),
        ({"tiling": {"use_saturation": 1}}, r"^ds_wsi\.tiling\.use_saturation must be of type bool, got 1"),
        ({"tiling": {"grey_range": 3}}, r"^ds_wsi\.tiling\.grey_range must be of type tuple, got 3"),
        ({"tiling": {"grey_range": ["a", 2]}}, r"^ds_wsi\.tiling\.grey_range\[0\] must be of type int, got 'a'"),
        ({"tiling": {"grey_range": [3, 2.5]}}, r"^ds_wsi\.tiling\.grey_range\[1\] must be of type int, got 2\.5"),
        ({"tiling": {"grey_range": [3]}}, r"^ds_wsi\.tiling: grey_range must be two rising values"),
        ({"tiling": {"grey_range": [3, 4, 5]}}, r"^ds_wsi\.tiling: grey_range must be two rising values"),
        ({"tiling": {"grey_range": [9, 3]}}, r"^ds_wsi\.tiling: grey_range must be two rising values"),
        ({"tiling": {"tile_size_px": 0}}, r"^ds_wsi\.tiling: tile_size_px must be at least 1, got 0"),
        ({"tiling": {"mpp": -1}}, r"^ds_wsi\.tiling: mpp must be positive"),
        ({"tiling": {"min_tissue_fraction": 1.5}}, r"^ds_wsi\.tiling: min_tissue_fraction must be in \[0, 1\]"),
        ({"reading": {"workers": -1}}, r"^ds_wsi\.reading: workers must be at least 0"),
        ({"reading": {"chunk_tiles": -1}}, r"^ds_wsi\.reading: chunk_tiles must be at least 0"),
        ({"reading": {"open_slides": 0}}, r"^ds_wsi\.reading: open_slides must be at least 1"),
        ({"reading": {"max_failed_fraction": 2}}, r"^ds_wsi\.reading: max_failed_fraction must be in \[0, 1\]"),
        ({"augment": {"colour": 1}}, r"^ds_wsi\.augment: colour must be in \[0, 1\)"),
        ([], r"^ds_wsi must be an object, got \[\]"),
        (3, r"^ds_wsi must be an object, got 3"),
        (None, r"^ds_wsi must be an object, got None"),
    ],
)
def test_errors_name_the_full_key(section, message):
    with pytest.raises(ValueError, match=message):
        read_section(section)


def test_a_list_is_taken_where_the_default_is_empty():
    section = {"tile_parallel": {"size": 2, "shares": [1, 2.5]}}
    assert read_section(section).tile_parallel.shares == (1, 2.5)
