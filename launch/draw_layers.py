"""Draw the layers of ds_wsi from its imports: docs/pictures/layers.svg.

python launch/draw_layers.py
"""

import ast
import sys
from pathlib import Path

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "layers.svg"
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 118, 34, 14, 34, 12


def package_imports(root: Path) -> dict[str, set[str]]:
    """Package of ds_wsi -> the others that it imports, inside functions too; not those for type checkers alone."""
    imports: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue
        imported = imports.setdefault(parts[0], set())
        for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            pieces = name.split(".")
            if pieces[0] == "ds_wsi" and len(pieces) > 1 and pieces[1] != parts[0]:
                imported.add(pieces[1])
    return {name: {other for other in others if other in imports} for name, others in imports.items()}


def _imported(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            if node.module == "ds_wsi":
                names += [f"ds_wsi.{alias.name}" for alias in node.names]
        names += _imported(node)
    return names


def layers(imports: dict[str, set[str]]) -> list[list[str]]:
    """The packages by height, the lowest first: each imports lower ones alone.

    Raises:
        ValueError: packages import each other in a circle; names them.
    """
    height: dict[str, int] = {}
    while len(height) < len(imports):
        ready = [name for name in imports if name not in height and imports[name] <= height.keys()]
        if not ready:
            raise ValueError(f"packages import each other: {', '.join(sorted(imports.keys() - height.keys()))}")
        for name in ready:
            height[name] = 1 + max((height[other] for other in imports[name]), default=-1)
    return [sorted(name for name in imports if height[name] == level) for level in range(max(height.values()) + 1)]


def picture(imports: dict[str, set[str]]) -> str:
    """The layers as SVG, the highest on top; a line leads down to each package that is imported."""
    rows = layers(imports)
    width = 2 * MARGIN + max(len(row) * (BOX_WIDTH + GAP_X) - GAP_X for row in rows)
    height = 2 * MARGIN + len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    places: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(reversed(rows)):
        left = (width - len(row) * (BOX_WIDTH + GAP_X) + GAP_X) / 2
        for column, name in enumerate(row):
            places[name] = left + column * (BOX_WIDTH + GAP_X), MARGIN + level * (BOX_HEIGHT + GAP_Y)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        'font-size="14">',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
    ]
    for name, others in sorted(imports.items()):
        x, y = places[name]
        for other in sorted(others):
            to_x, to_y = places[other]
            lines.append(
                f'<line x1="{x + BOX_WIDTH / 2:g}" y1="{y + BOX_HEIGHT:g}" x2="{to_x + BOX_WIDTH / 2:g}" y2="{to_y:g}" '
                'stroke="#c8ccd4" stroke-width="1"/>'
            )
    for name, (x, y) in sorted(places.items()):
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" fill="#eef2fb" '
            'stroke="#3f51b5"/>'
        )
        lines.append(
            f'<text x="{x + BOX_WIDTH / 2:g}" y="{y + BOX_HEIGHT / 2 + 5:g}" text-anchor="middle">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(package_imports(ROOT / "ds_wsi")), encoding="utf-8")
