"""The packages import in one direction: read from the source, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

import ds_wsi

ROOT = Path(ds_wsi.__file__).parent
# A package may import those of lower layers. Siblings of a layer do not import each other, but for the pairs allowed.
LAYERS = (
    {"runtime"},
    {"norms"},
    {"slides", "partition", "stacking", "tile_parallel", "compression", "models"},
    {"bags"},
    {"config"},
    {"engines"},
    {"evaluation", "doctor"},
    {"training"},
    {"cli", "commands", "benchmarks"},
)
# Aggregators work on stacks; a bag across ranks is pooled by the aggregators' own contract; cli calls the commands.
SIBLINGS = {("models", "stacking"), ("tile_parallel", "stacking"), ("tile_parallel", "models"), ("cli", "commands")}
FRAMEWORKS = {"deepspeed", "accelerate", "transformers"}


def layer_of(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
    return names


def violations(package: str, tree: ast.AST) -> list[str]:
    found = []
    for name in imported_modules(tree):
        parts = name.split(".")
        if parts[0] == "ds_wsi" and len(parts) > 1 and parts[1] != package:
            allowed = layer_of(parts[1]) < layer_of(package) or (package, parts[1]) in SIBLINGS
            found += [] if allowed else [f"{package} imports {name}"]
        if parts[0] in FRAMEWORKS and package != "engines":
            found.append(f"{package} imports the framework {name}")
    return found


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative != Path("__init__.py"):
            yield (relative.parts[0] if len(relative.parts) > 1 else relative.stem), path


@pytest.mark.parametrize(
    ("package", "path"), [pytest.param(*item, id=str(item[1].relative_to(ROOT))) for item in sources()]
)
def test_imports_point_down(package, path):
    assert violations(package, ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_check_finds_upward_and_framework_imports():
    tree = ast.parse("def f():\n    from ds_wsi.training.loop import train\n    import deepspeed.comm")
    assert sorted(violations("slides", tree)) == [
        "slides imports ds_wsi.training.loop",
        "slides imports the framework deepspeed.comm",
    ]
