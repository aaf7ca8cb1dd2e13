"""The map of the house is the house: the drawn layers are the imports', and the rooms it names exist."""

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


READMES = sorted(path for top in ("ds_wsi", "launch") for path in (ROOT / top).rglob("*/README.md"))
MANY = 6  # files, above which a package says what each holds


def rooms_of(folder):
    """Its modules and packages, by name."""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in folder.glob("*/__init__.py")}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_readme_names_each_room_of_its_package_and_no_other(readme):
    rows = re.findall(r"^\| (`.*?) \|", readme.read_text("utf-8"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert len(named) == len(set(named))
    text = set(re.findall(r"`([\w./]+)`", readme.read_text("utf-8")))
    rooms = rooms_of(readme.parent)
    assert rooms - {name.removesuffix("/").removesuffix(".py") for name in text} == set()
    assert [name for name in named if name not in rooms and not (readme.parent / name).exists()] == []


def test_every_package_of_many_files_has_a_readme():
    folders = [path.parent for top in ("ds_wsi", "launch") for path in (ROOT / top).rglob("__init__.py")]
    lacking = [
        folder
        for folder in folders
        if len(list(folder.glob("*.py"))) > MANY + 1 and not (folder / "README.md").exists()
    ]
    assert lacking == []
