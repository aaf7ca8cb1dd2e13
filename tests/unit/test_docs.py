"""The documentation builds strictly, and what is written from results or code is what they say."""

import argparse
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from ds_wsi.bags.manifest import parse_manifest
from ds_wsi.cli import build_parser
from ds_wsi.config import DsWsiConfig

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings")


@pytest.fixture(scope="module")
def docs_pages():
    spec = spec_from_file_location("docs_pages", ROOT / "launch" / "docs_pages.py")
    module = module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.skipif(
    not all(map(find_spec, NEEDED)), reason="needs mkdocs-material and mkdocstrings: pip install '.[docs]'"
)
def test_the_pages_build_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert "--gpu_budget" in (site / "reference/options/index.html").read_text("utf-8")
    assert "gpu_budget_bytes" in (site / "reference/json/index.html").read_text("utf-8")
    assert 'id="ds_wsi.partition_layers"' in (site / "reference/api/index.html").read_text("utf-8")
    assert (site / "launch/results/partition.png").is_file()


def test_benchmarks_are_of_the_results(docs_pages, tmp_path):
    page = ROOT / "docs" / "benchmarks.md"
    copy = tmp_path / "benchmarks.md"
    copy.write_text(page.read_text("utf-8"), "utf-8")
    docs_pages.write_benchmarks(copy, ROOT / "launch" / "results")
    assert copy.read_text("utf-8") == page.read_text("utf-8"), "HINT: python launch/docs_pages.py"
    copy.write_text(re.sub(r"\| 26\.8 \|", "| 99.9 |", page.read_text("utf-8")), "utf-8")
    docs_pages.write_benchmarks(copy, ROOT / "launch" / "results")
    assert copy.read_text("utf-8") == page.read_text("utf-8")


def test_each_key_of_the_section_is_told(docs_pages):
    tables = docs_pages.json_tables()
    for section in DsWsiConfig.__dataclass_fields__:
        assert f"### {section}\n" in tables
    assert re.findall(r"^\| `\w+` \| .* \|  ?\|$", tables, re.M) == [], "a key without words"


def test_every_command_is_told(docs_pages):
    tables = docs_pages.options_tables()
    for command in ("train", "evaluate", "tile", "features", "protocol panda", "plan"):
        assert f"ds-wsi {command}\n" in tables
    assert "| `--gpu_budget " in tables


def test_every_option_of_every_command_has_its_line(docs_pages):
    sections = dict(re.findall(r"^##+ (ds-wsi [\w ]+)\n(.*?)(?=^##|\Z)", docs_pages.options_tables(), re.M | re.S))
    n_options = 0
    for words, parser in leaves(build_parser(), "ds-wsi"):
        for action in parser._actions:
            names = [name for name in action.option_strings if name.startswith("--")] or [action.dest]
            if "--help" not in names and action.help != argparse.SUPPRESS:
                lines = re.findall(rf"^\| `{re.escape(names[0])}[ `].*\| (.+) \|$", sections[words], re.M)
                assert len(lines) == 1, (words, names)
                assert len(lines[0].split()) > 1, (words, names)
                n_options += 1
    assert n_options > 200


def leaves(parser, words):
    """The commands without subcommands, with their words."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, parser
    for name, one in inner[0].choices.items() if inner else ():
        yield from leaves(one, f"{words} {name}")


def test_the_table_of_my_slides_is_read(tmp_path):
    page = (ROOT / "docs" / "how_to" / "slides.md").read_text("utf-8")
    table = re.search(r"<!-- my_slides\.csv -->\n```csv\n(.*?)```", page, re.S)[1]
    (tmp_path / "my_slides.csv").write_text(table, "utf-8")
    manifest, _ = parse_manifest(tmp_path / "my_slides.csv", need_slides=False)
    slides = [(slide.slide_id, manifest.label_name(slide), slide.split, slide.mpp) for slide in manifest.slides]
    assert slides == [("S-001", "tumor", "train", None), ("S-002", "normal", "test", 0.25)]


def test_links_out_of_docs_lead_to_files_of_the_site(docs_pages):
    class Page:
        class file:  # noqa: N801
            src_uri = "how_to/slurm.md"

    written = docs_pages.on_page_markdown("[a](../../CHANGELOG.md), [b](../files.md#x)", Page, None, None)
    assert written == "[a](../CHANGELOG.txt), [b](../files.md#x)"
