"""The map of the house is the house: the drawn layers are the imports', and the rooms it names exist."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "ds_wsi" / "README.md").read_text("utf-8")


@pytest.fixture
def draw_layers(monkeypatch):
    spec = importlib.util.spec_from_file_location("draw_layers", ROOT / "launch" / "draw_layers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script changes
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_the_imports(draw_layers):
    imports = draw_layers.package_imports(ROOT / "ds_wsi")
    assert draw_layers.PICTURE.read_text("utf-8") == draw_layers.picture(imports), "python launch/draw_layers.py"
    assert draw_layers.layers(imports)[0] == ["runtime"]


def test_an_import_inside_a_function_counts_and_one_for_type_checkers_does_not(draw_layers, tmp_path):
    for name, text in {
        "low": "",
        "high": "def f():\n    from ds_wsi.low.a import b\n",
        "typed": "if TYPE_CHECKING:\n    from ds_wsi.high import a\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "room.py").write_text(text)
    imports = draw_layers.package_imports(tmp_path)
    assert imports == {"low": set(), "high": {"low"}, "typed": set()}
    assert draw_layers.layers(imports) == [["low", "typed"], ["high"]]
    with pytest.raises(ValueError, match="packages import each other: a, b"):
        draw_layers.layers({"a": {"b"}, "b": {"a"}, "c": set()})


def test_every_package_is_on_the_map(draw_layers):
    table = MAP.split("## How data flows")[0]
    assert {name for name in re.findall(r"`([a-z_]+)`", table)} >= draw_layers.package_imports(ROOT / "ds_wsi").keys()


def test_every_room_that_the_map_names_exists():
    rows = MAP.split("## Where does my line go")[1]
    rooms = re.findall(r"`([\w/]+(?:\.py|/))`", rows)
    assert len(rooms) > 18
    assert [room for room in rooms if not any((base / room).exists() for base in (ROOT, ROOT / "ds_wsi"))] == []


def test_no_file_of_tests_is_over_400_lines_and_no_function_over_60():
    """A topic is a file: what several share is a plain module beside them."""
    long = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text("utf-8")
        lines = text.count("\n")
        long += [f"{path.relative_to(ROOT)}: {lines} lines"] * (lines > 400)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                long += [f"{path.relative_to(ROOT)}: {node.name}, {lines} lines"] * (lines > 60)
    assert long == []
