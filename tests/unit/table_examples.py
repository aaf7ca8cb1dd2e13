"""Tables as files, and what is read of them; docs/tables.md's examples are read from its page."""

import re
from pathlib import Path

from ds_wsi.bags.manifest import parse_manifest

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


def example(name, folder):
    """The page's example of this name, as a file."""
    match = re.search(rf"<!-- {re.escape(name)} -->\n```csv\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / name).write_text(match[1])
    return folder / name


def write(folder, *lines, name="m.csv", sep=","):
    path = folder / name
    path.write_text("\n".join(sep.join(map(str, line)) for line in lines) + "\n", encoding="utf-8")
    return path


def parsed(path, **options):
    """A table of features: no files of slides are needed."""
    manifest, problems = parse_manifest(path, options.pop("classes", None), need_slides=False, **options)
    assert problems == []
    return manifest


def problems_of(path, classes=None, **options):
    return parse_manifest(path, classes, need_slides=options.pop("need_slides", False), **options)[1]


def labels_of(manifest):
    return [manifest.label_name(slide) for slide in manifest.slides]
