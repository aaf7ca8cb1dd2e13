"""The map of the house is the house: the drawn layers are the imports', and the rooms it names exist.

Its files and functions are short, and its parts ask each other by contracts, not by names in strings.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("ds_wsi", "launch") for path in (ROOT / folder).rglob("*.py"))
CONTRACTS = ROOT / "ds_wsi" / "runtime" / "contracts.py"
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines
# Names that ds_wsi has too, but asks of others' objects.
OF_OTHERS = {
    "_hp_optimizer_states_linked": "DeepSpeed's optimizer",
    "config": "DeepSpeed's engine, models of transformers",
    "inplace": "torch's layers",
    "momentum": "torch's norms",
    "name": "h5py's files",
    "num_features": "timm's models",
    "optimizer": "the wrappers of Accelerate and DeepSpeed",
    "shape": "tensors and arrays",
    "tile": "Pillow's images",
    "track_running_stats": "torch's norms",
}
# Names that ds_wsi asks of its own objects all the same, and the file that gives the reason: three at most.
ASKED_BY_NAME = {"stack": "ds_wsi/partition/graph/trace.py"}
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


def too_long(text):
    """What of a file is too long; a function begins with `def`, not with its decorators."""
    lengths = [("file", len(text.splitlines()), LONGEST_FILE)]
    lengths += [
        (node.name, node.end_lineno - node.lineno + 1, LONGEST_FUNCTION)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{name} {length}" for name, length, longest in lengths if length > longest]


def test_no_file_and_no_function_is_too_long():
    tests = sorted((ROOT / "tests").rglob("*.py"))  # what several share is a plain module beside them
    faults = {str(path.relative_to(ROOT)): too_long(path.read_text("utf-8")) for path in [*SOURCES, *tests]}
    assert {path: words for path, words in faults.items() if words} == {}


def test_lines_are_counted_from_def_to_the_last():
    def function(n_lines, head="def f():", indent=""):
        return f"{indent}{head}\n" + f"{indent}    x = 1\n" * (n_lines - 1)

    assert too_long(function(60)) == []
    assert too_long(function(61)) == ["f 61"]
    assert too_long("@decorated\n@twice\n" + function(60)) == []
    assert too_long(function(61, "async def f():")) == ["f 61"]
    assert too_long("class A:\n" + function(61, "def method(self):", "    ")) == ["method 61"]
    assert too_long("def outer():\n" + function(61, indent="    ")) == ["outer 62", "f 61"]
    assert too_long("x = 1\n" * 400) == []
    assert too_long("x = 1\n" * 401) == ["file 401"]


def names_asked(tree):
    """Name -> the lines of `getattr(x, "name", ...)` and `hasattr(x, "name")`; Python's own names aside."""
    asked = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and not name.value.startswith("__"):
                asked.setdefault(name.value, []).append(node.lineno)
    return asked


def names_given(tree):
    """Attributes that a file's classes have, or that it sets on an object."""
    given = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            given |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            targets = [target for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
            targets += [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            given |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            given.add(node.attr)
    return given


def test_own_objects_are_asked_by_contract_and_not_by_name():
    trees = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
    contracts = set().union(*map(names_given, trees.values()))
    assert contracts >= {"encodes_stacks", "needs_labels", "pooling", "packed", "frozen_parts", "takes_host_tiles"}
    asked = {}
    for path, tree in trees.items():
        lines = path.read_text("utf-8").splitlines()
        for name, places in names_asked(tree).items():
            if name in contracts and name not in OF_OTHERS:
                asked[name] = str(path.relative_to(ROOT))
                assert all("#" in lines[line - 2] + lines[line - 1] for line in places), f"{path}: give the reason"
    assert asked == ASKED_BY_NAME
    assert len(ASKED_BY_NAME) <= 3
    assert not names_given(trees[CONTRACTS]) & OF_OTHERS.keys()


def test_a_question_by_name_is_seen():
    asking = ast.parse('if hasattr(x.y, "b"): z = getattr(f(x), "a", None)\ngetattr(x, name); getattr(x, "__doc__")')
    assert names_asked(asking) == {"b": [1], "a": [1]}
    giving = ast.parse("class A:\n    a = 1\n    b: int\n    def c(self):\n        self.d = 1\nA().e = self.f")
    assert names_given(giving) == {"a", "b", "c", "d", "e"}


READMES = sorted(path for top in ("ds_wsi", "launch") for path in (ROOT / top).rglob("*/README.md"))
MANY = 6  # files, above which a package says what each holds


def rooms_of(folder):
    """The modules and packages of a folder, by name."""
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
