"""The packages import in one direction: read from the source, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

import ds_wsi

ROOT = Path(ds_wsi.__file__).parent
LAUNCH = Path(__file__).parents[2] / "launch"
# A package may import those of lower layers. Siblings of a layer do not import each other, but for the pairs allowed.
LAYERS = (
    {"runtime"},
    {"norms", "targets"},
    {"slides", "partition", "stacking", "tile_parallel", "compression", "models"},
    {"bags"},
    {"config"},
    {"engines"},
    {"evaluation", "doctor"},
    {"training"},
    {"cli", "commands"},
    {"launch"},  # beside ds_wsi, and not installed with it
)
# Aggregators work on stacks; a bag across ranks is pooled by the aggregators' own contract; cli calls the commands.
SIBLINGS = {("models", "stacking"), ("tile_parallel", "stacking"), ("tile_parallel", "models"), ("cli", "commands")}
# The rooms of a package, in the same way; of one layer none imports another.
ROOMS = {
    "engines": (
        {"machine", "sharded"},
        {"deepspeed_json", "policies"},
        {"comm_hooks"},
        {"accelerator", "initialize"},
        {"full_state", "hf"},
    ),
    "partition": (
        {"policy", "module"},
        {"graph"},
        {"execution"},
        {"planning"},
        {"checking"},
        {"forward"},
        {"apply", "report"},
    ),
}
FRAMEWORKS = {"deepspeed", "accelerate", "transformers"}
NOT_INSTALLED = {"launch", "tests"}


def layer_of(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}  # a module or what it has
    return names


def outermost(names: set[str]) -> list[str]:
    """The names that are not inside of another."""
    return sorted(name for name in names if name.rpartition(".")[0] not in names)


def violations(package: str, tree: ast.AST) -> list[str]:
    faults = []
    for name in outermost(imported_modules(tree)):
        parts = name.split(".")
        if parts[0] == "ds_wsi" and len(parts) > 1 and parts[1] != package:
            allowed = layer_of(parts[1]) < layer_of(package) or (package, parts[1]) in SIBLINGS
            faults += [] if allowed else [f"{package} imports {name}"]
        if parts[0] in FRAMEWORKS and package != "engines":
            faults.append(f"{package} imports the framework {name}")
        if parts[0] in NOT_INSTALLED and package != "launch":
            faults.append(f"{package} imports {name}, which is not installed")
    return faults


def room_violations(room: str, layers: tuple[set[str], ...], prefix: str, tree: ast.AST) -> list[str]:
    def height(name: str) -> int:
        return next(index for index, layer in enumerate(layers) if name in layer)

    names = {name.removeprefix(prefix).split(".")[0] for name in imported_modules(tree) if name.startswith(prefix)}
    return [f"{room} imports {name}" for name in sorted(names - {room}) if height(name) >= height(room)]


def circles(modules: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    reached = {name: set(targets) for name, targets in modules.items()}
    for middle in modules:
        for name in modules:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return sorted(name for name in modules if name in reached[name])


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative != Path("__init__.py"):
            yield (relative.parts[0] if len(relative.parts) > 1 else relative.stem), path
    for path in sorted(LAUNCH.rglob("*.py")):
        yield "launch", path


@pytest.mark.parametrize(
    ("package", "path"), [pytest.param(*item, id=str(item[1].relative_to(LAUNCH.parent))) for item in sources()]
)
def test_imports_point_down(package, path):
    assert violations(package, ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("package", "path"),
    [pytest.param(package, path, id=str(path.relative_to(ROOT))) for package, path in sources() if package in ROOMS],
)
def test_rooms_import_down(package, path):
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    if parts != ("__init__",):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert room_violations(parts[0], ROOMS[package], f"ds_wsi.{package}.", tree) == []


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_packages_are_small_enough_to_enter(package):
    rooms = {path.stem for path in (ROOT / package).iterdir() if path.suffix in ("", ".py")} - {
        "__init__",
        "__pycache__",
    }
    assert rooms == set().union(*ROOMS[package])
    assert len(rooms) <= 9


def test_no_module_imports_itself_by_way_of_others():
    """All packages, whether an import is at the top, in a function or for type checkers alone."""
    imports = {}
    for _, path in sources():
        name = ".".join(path.relative_to(LAUNCH.parent).with_suffix("").parts).removesuffix(".__init__")
        imports[name] = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    assert len(imports) > 400
    assert circles({name: targets & imports.keys() - {name} for name, targets in imports.items()}) == []


def test_the_check_finds_rooms_and_circles():
    tree = ast.parse("from ds_wsi.engines.hf.trainer import SlideTrainer\nfrom ds_wsi.engines.machine import cpu")
    assert room_violations("comm_hooks", ROOMS["engines"], "ds_wsi.engines.", tree) == ["comm_hooks imports hf"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_the_check_finds_upward_and_framework_imports():
    lines = ("from ds_wsi.training.loop import train", "import deepspeed.comm", "import launch.benchmarks.table")
    tree = ast.parse("\n    ".join(("def f():", *lines)))
    assert sorted(violations("slides", tree)) == [
        "slides imports ds_wsi.training.loop",
        "slides imports launch.benchmarks.table, which is not installed",
        "slides imports the framework deepspeed.comm",
    ]
