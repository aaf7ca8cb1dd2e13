"""Private names of other packages: all are in the table of `ds_wsi.runtime.seams`, and where it says that they may be.

Read from the source. Other packages' are: attributes that begin with an underscore, of objects other than `self`, and
of `self` where no class of ours makes them; what is imported from or by such a name; such strings that are given to
getattr, hasattr, setattr and delattr; everything that begins with `ds_`, as DeepSpeed's attributes of parameters do;
and every name of the table, in any string too.
"""

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.version import Version

import ds_wsi
from ds_wsi.runtime import seams
from ds_wsi.runtime.seams import SEAMS, SEEN, Seam, SeamError, check_replaced, check_seams, checks, missing_seams

ROOT = Path(ds_wsi.__file__).parent
TABLE = "runtime/seams/"
# Python's own: documented in spite of the underscore, or of the standard library, which we install with Python.
PYTHONS = {
    *("_asdict", "_replace", "_fields"),  # of a NamedTuple
    "_exit",  # of os
    "_children",  # of multiprocessing.process: a forked worker forgets its siblings
    *("_SubParsersAction", "_option_string_actions", "_format_args", "_get_default_metavar_for_optional"),  # argparse
    *("_format_action_invocation", "_check_value"),  # argparse
}
BY_STRING = ("getattr", "hasattr", "setattr", "delattr")
PUBLIC = {"load", "save_model"}  # rows for what they take: everybody has methods of these names
KNOWN = {row.leaf for row in SEAMS} - PUBLIC
PARTS = {part for row in SEAMS for part in row.name.replace(":", ".").split(".")[:-1]} - KNOWN  # on the way to a row
OURS_OF_DS = ("ds_wsi", "ds_configs")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def sources() -> dict[str, ast.Module]:
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(ROOT.rglob("*.py"))
        if "benchmarks" not in path.relative_to(ROOT).parts  # they measure, and are no part of what is installed
    }


def made_here(trees: dict[str, ast.Module]) -> set[str]:
    """Private names that ds_wsi defines: functions, classes, attributes of `self`, variables of modules and classes."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        names |= set_on_self(tree)
    return names


def on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def set_on_self(tree: ast.Module) -> set[str]:
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and on_self(node))
    return {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}


def foreign_names(tree: ast.Module, ours: set[str]) -> list[tuple[int, str]]:
    """(line, name) of each private name of another package that a module writes."""
    at_lines: list[tuple[int, str]] = []
    set_here = set_on_self(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [] if on_self(node) and node.attr in set_here else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("ds_wsi"):
            hidden = any(is_private(part) for part in (node.module or "").split(".")) and node.module != "__future__"
            names = [one.name for one in node.names if hidden or is_private(one.name)]
            at_lines += [(node.lineno, name) for name in names]
            continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_STRING:
            names = [one.value for one in node.args[1:2] if isinstance(one, ast.Constant) and type(one.value) is str]
            names = [name for name in names if name not in KNOWN]  # those are found below
        elif isinstance(node, ast.Constant) and node.value in KNOWN:  # a tuple of names, a method that is replaced
            names = [node.value]
        for name in names:
            deepspeeds = name.startswith("ds_") and name not in OURS_OF_DS
            if name in KNOWN or deepspeeds or (is_private(name) and name not in ours):
                at_lines.append((node.lineno, name))
    return [(line, name) for line, name in at_lines if name not in PYTHONS | PARTS and not is_dunder(name)]


def written_names(tree: ast.Module) -> set[str]:
    """Everything that a module could mean a row by: attributes, imports, definitions, strings and their parts."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


def stray(trees: dict[str, ast.Module]) -> list[str]:
    """Each private name that the table lacks, or that is written where it may not be."""
    made, faults = made_here(trees), []
    for path, tree in trees.items():
        if path.startswith(TABLE):
            continue
        package = path.split("/")[0]
        for line, name in foreign_names(tree, made):
            rows = [row for row in SEAMS if row.leaf == name]
            if not rows:
                faults.append(f"{path}:{line}: {name} is in no row of {TABLE}")
            elif not any(package in row.places for row in rows):
                faults.append(f"{path}:{line}: {name} may be written in {rows[0].places or TABLE} alone")
    return faults


def test_every_private_name_is_in_the_table_and_in_its_place():
    assert stray(sources()) == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("models/x.py", "def f(p): return p._no_such", "_no_such is in no row"),
        ("models/x.py", "from torch.nn.modules.batchnorm import _BatchNorm", "_BatchNorm may be written in ('part"),
        ("models/x.py", "def f(p): return hasattr(p, 'ds_id')", "ds_id may be written in ('partition', 'engines')"),
        ("models/x.py", "def f(p): return p.ds_status", "ds_status is in no row"),
        ("models/x.py", "from torch._inductor import config", "config is in no row"),
        ("models/x.py", "def f(z): return z.bit16_groups_flat", "bit16_groups_flat may be written in ('engines',)"),
        ("models/x.py", "def f(p): return getattr(p, '_op_dk', None)", "_op_dk is in no row"),
        ("models/x.py", "class A(B):\n    def f(self): return self._of_b", "_of_b is in no row"),
        ("partition/x.py", "def f(t): return t.untyped_storage()._cdata", None),
        ("models/x.py", "class A:\n    def f(self): self._own = self._own", None),
        ("models/x.py", "def f(row): return row._replace(a=1)", None),
    ],
)
def test_the_check_finds_them(path, text, words):
    faults = stray({path: ast.parse(text)})
    assert len(faults) == (words is not None), faults
    if words is not None:
        assert words in faults[0]


def test_no_row_is_of_the_past():
    """Each row is written in the table's own functions, and in every package that it allows."""
    trees = sources()
    by_package: dict[str, set[str]] = {}
    for path, tree in trees.items():
        by_package.setdefault("table" if path.startswith(TABLE) else path.split("/")[0], set()).update(
            written_names(tree)
        )
    classes = set(seams.CLASSES.values())
    for row in SEAMS:
        mangled = row.leaf.partition("_Stage3")[2]  # a method that begins with two underscores
        forms = {row.leaf, row.leaf.removeprefix("_global"), mangled or row.leaf}
        for package in row.places:
            written = by_package[package]
            assert any(form in written for form in forms), f"{row.name} is no longer written in {package}"
        if not row.places:
            text = (ROOT / TABLE / "readers.py").read_text()
            assert row.name in classes or row.leaf in text, f"{row.name} is used by no function of {TABLE}"


def test_no_row_is_there_twice_and_all_are_of_known_packages():
    assert len({(row.name, row.use) for row in SEAMS}) == len(SEAMS)
    assert {row.package for row in SEAMS} == SEEN.keys()
    assert all(row.purpose for row in SEAMS)


@pytest.mark.parametrize("package", SEEN)
def test_the_versions_seen_are_the_bounds_the_constraints_and_the_documents(package):
    oldest, newest = SEEN[package]
    text = {name: (ROOT.parent / name).read_text("utf-8") for name in ("pyproject.toml", "CONTRIBUTING.md")}
    (bound,) = re.findall(rf'^    "{package}>=([\d.]+)', text["pyproject.toml"], re.M)
    assert oldest in (bound, f"{bound}.0")
    assert f"\n{package}=={oldest}\n" in (ROOT.parent / "constraints" / "oldest.txt").read_text("utf-8")
    assert f"{package} {oldest} to {newest}" in " ".join(text["CONTRIBUTING.md"].split())


@pytest.mark.parametrize("package", SEEN)
def test_the_installed_version_has_all_names(package):
    installed = Version(version(package))
    assert [row.name for row in missing_seams(package) if installed >= Version(row.since or "0")] == []


# --- broken worlds ---


@pytest.fixture
def module(monkeypatch, tmp_path):
    """A module of torch's as a later release might have it; its text is on disk, as those of packages are."""
    path = tmp_path / "renamed.py"
    path.write_text("class Group:\n    def __init__(self):\n        self._renamed_size = 1\n")
    made = ModuleType("torch.renamed")
    made.__file__ = str(path)
    made.Group = type("Group", (), {"step": lambda self, index, closure: None})
    monkeypatch.setitem(sys.modules, "torch.renamed", made)
    checks._text_of.cache_clear()
    yield
    checks._text_of.cache_clear()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Seam("torch.renamed:*._orig_size", "x", "a shape"), "must have it, as in torch 2.11.0 to 2.14.1, got none in"),
        (Seam("torch.renamed:Group._size", "x", "a shape"), "torch.renamed.Group._size (a shape) must have it"),
        (Seam("torch.gone:Group", "x", "a group"), "got none (No module named 'torch.gone')"),
        (Seam("torch.gone:*._size", "x", "a group"), "torch.gone > _size"),
        (Seam("torch.renamed:Group.step", "x", "a step", takes=("index",)), "must take ('index',)"),
        (Seam("torch.renamed:Group.step", "x", "a step", takes=("index",)), "got ('index', 'closure')"),
    ],
)
def test_a_missing_name_is_refused_with_versions_and_remedy(module, monkeypatch, row, words):
    monkeypatch.setattr(checks, "SEAMS", (row,))
    monkeypatch.setattr(checks, "version", lambda package: "9.9")
    check_seams.cache_clear()
    with pytest.raises(SeamError) as refused:
        check_seams("torch", "x")
    check_seams.cache_clear()
    assert words in str(refused.value)
    assert str(refused.value).endswith('in torch 9.9. HINT: pip install "torch==2.14.1".')


def test_an_optional_name_and_another_use_are_not_missed(module, monkeypatch):
    row = Seam("torch.renamed:*._orig_size", "x", "a shape")
    monkeypatch.setattr(checks, "SEAMS", (row._replace(optional=True), row._replace(use="y")))
    assert list(missing_seams("torch", "x")) == []
    assert len(list(missing_seams("torch"))) == 1
    monkeypatch.setattr(checks, "SEAMS", (row._replace(name="torch.renamed:*._renamed_size"),))
    assert list(missing_seams("torch", "x")) == []


def test_a_class_that_is_gone_is_refused_where_it_is_imported(monkeypatch):
    from torch.nn.modules import batchnorm

    assert seams.AnyBatchNorm is batchnorm._BatchNorm
    monkeypatch.delattr(batchnorm, "_BatchNorm")
    with pytest.raises(SeamError, match=r"torch\.nn\.modules\.batchnorm\._BatchNorm \(what all BatchNorms are\)"):
        _ = seams.AnyBatchNorm
    with pytest.raises(AttributeError):
        _ = seams.NoSuchClass


def test_methods_that_are_replaced_are_checked_on_the_instance():
    def profiled(function):
        """A wrapper like DeepSpeed's, which does not say what it wraps."""

        def wrapped(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapped

    class Engine:
        @profiled
        def allreduce_bucket(self, bucket, dp_group, dp_world_size=None):
            return bucket

    check_replaced(Engine(), "replaced zero0")
    with pytest.raises(SeamError, match=r"must take \('bucket', 'dp_group', 'dp_world_size'\).*got \('bucket',\)"):
        check_replaced(SimpleNamespace(allreduce_bucket=lambda bucket: bucket), "replaced zero0")
    with pytest.raises(SeamError, match="got none in deepspeed"):
        check_replaced(SimpleNamespace(), "replaced zero3")


def test_older_ways_serve():
    """Torch 2.11 has one group of parameters per FSDP2 unit, DeepSpeed 0.18 one place of a loss scale."""
    one, two = object(), object()
    unit = lambda **state: SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(**state))  # noqa: E731
    assert seams.fsdp_param_groups(unit(_fsdp_param_group=one)) == [one]
    assert seams.fsdp_param_groups(unit(_fsdp_param_group=None)) == []
    assert seams.fsdp_param_groups(unit(_fsdp_param_groups=[one, two])) == [one, two]
    assert seams.fp16_scale_of(SimpleNamespace(cur_scale=4))() == 4.0
    config = SimpleNamespace(cur_scale=8)
    scale = seams.fp16_scale_of(SimpleNamespace(loss_scale_config=config))
    config.cur_scale = 16
    assert scale() == 16.0
