"""The parts of docs/ that are written from the code, and what mkdocs needs to build the pages (its `hooks`).

python launch/docs_pages.py     # writes the tables of docs/benchmarks.md from launch/results

Options and JSON keys take the place of `<!-- built: NAME -->` when the pages are built, so that they cannot drift.
"""

import argparse
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin, written by python launch/docs_pages.py -->", "<!-- benchmarks: end -->"
BENCHMARKS = (
    *("tiles", "store", "partition", "equivalence", "scaling", "stacking", "compression", "local_updates", "protocol"),
)
BUILT = re.compile(r"<!-- built: (\w+) -->")
# Files outside docs/ to which pages link: they are part of the built site, under the same path.
OUTSIDE = (
    *(
        "launch/results/*.png",
        "launch/results/*.md",
        "launch/results/*.json",
        "launch/slurm/*",
        "launch/accelerate/*.yaml",
    ),
    *("ds_configs/*.json", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "Dockerfile"),
)


def bounds_table(results: Path) -> str:
    """Each benchmark's bounds with what was measured, and where: Markdown, from `results`/NAME.json."""
    lines: list[str] = []
    for name in BENCHMARKS:
        record = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        lines += [f"### {name}: {record['title']}", ""]
        lines += ["| bound | measured | holds |", "|---|---|---|"]
        for bound in record["bounds"]:
            sign = "at most" if bound["at_most"] else "at least"
            limit = "" if sign in bound["words"] or "within" in bound["words"] else f" ({sign} {bound['limit']:g})"
            holds = "yes" if bound["holds"] else "no"
            lines.append(f"| {_cell(bound['words'])}{limit} | {bound['measured']:.3g} | {holds} |")
        lines += ["", f"{_machine(record['environment'])} [All rows](../launch/results/{name}.md).", ""]
    return "\n".join(lines).rstrip()


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("ds_wsi", "torch", "deepspeed", "timm"))
    gpu = "no GPU" if environment["gpu"] == "none" else environment["gpu"]
    return f"{environment['cpu_count']} cores of {environment['cpu']}, {gpu}; {versions}."


def write_benchmarks(page: Path, results: Path) -> None:
    """Put the tables between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{bounds_table(results)}\n\n{END}{after}", encoding="utf-8")


def options_tables() -> str:
    """The options of every command of `ds-wsi`, a section per command."""
    from ds_wsi.cli import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in commands._choices_actions}
    lines: list[str] = []
    for name, parser in commands.choices.items():
        lines += [f"## ds-wsi {name}", "", f"{_sentence(helps.get(name) or '')}", ""]
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for sub, one in inner[0].choices.items() if inner else ():
            lines += [f"### ds-wsi {name} {sub}", "", *_option_rows(one), ""]
        lines += [] if inner else [*_option_rows(parser), ""]
    return "\n".join(lines)


def _option_rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield "| option | |"
    yield "|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        names = [option for option in action.option_strings if option.startswith("--")][:1] or [action.dest]
        takes = "" if action.nargs == 0 else f" {_metavar(action)}"
        words = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield f"| `{names[0]}{takes}` | {_cell(words)} |"


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.rpartition(".")[2].upper())


def settings_table() -> str:
    """What each setting has a part in: Markdown."""
    from ds_wsi.runtime.setting import Decides
    from ds_wsi.training.setting_list import SETTINGS

    lines = ["| has a part in | settings |", "|---|---|"]
    for kind in Decides:
        names = [
            one.setting.option or field_path for field_path, one in SETTINGS.items() if one.setting.decides is kind
        ]
        lines.append(f"| {_cell(kind.value)} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def json_tables() -> str:
    """The keys of the "ds_wsi" section of a DeepSpeed JSON, a table per policy."""
    from ds_wsi.config import DsWsiConfig

    lines: list[str] = []
    about = _arguments(DsWsiConfig)
    for section in fields(DsWsiConfig):
        policy: Any = section.metadata.get("kind", section.default_factory)
        words, defaults = _arguments(policy), policy()
        lines += [f"### {section.name}", "", f"{_sentence(about[section.name])} (`{policy.__name__}`)", ""]
        lines += ["| key | default | |", "|---|---|---|"]
        for entry in fields(policy):
            default = json.dumps(getattr(defaults, entry.name))
            lines.append(f"| `{entry.name}` | `{default}` | {_cell(words.get(entry.name, ''))} |")
        lines.append("")
    return "\n".join(lines)


def _arguments(kind: type) -> dict[str, str]:
    """What a docstring's Args section says of each name; names that share a line share its words."""
    section = re.search(r"^ *Args:\n(.*?)(?:\n\s*\n|\Z)", kind.__doc__ or "", re.MULTILINE | re.DOTALL)
    indent = re.match(r" *", section[1])[0] if section else ""  # type: ignore[index]
    texts: dict[str, str] = {}
    for names, words in re.findall(
        rf"^{indent}(\w[\w, ]*): (.*?)(?=^{indent}\w|\Z)", section[1] if section else "", re.M | re.S
    ):
        texts |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return texts


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


# --- what mkdocs calls ---

PARTS = {"options": options_tables, "settings": settings_table, "json": json_tables}


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ to which pages link."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            file = File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
            if path.suffix == ".md":
                file = File.generated(config, file.src_uri.replace(".md", ".txt"), content=path.read_text("utf-8"))
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Write what is built, and lead links out of docs/ to the files that `on_files` added."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        # Seen from the repository, docs/ is one level deeper than seen from the site.
        outside = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if outside.startswith("docs/") or not (ROOT / outside).is_file():
            return link[0]
        return f"]({posixpath.relpath(outside, folder or '.').replace('.md', '.txt')})"

    markdown = re.sub(r"\]\((\.\./[^)#\s]+)\)", inside, markdown)
    return BUILT.sub(lambda mark: PARTS[mark[1]](), markdown)


if __name__ == "__main__":
    write_benchmarks(ROOT / "docs" / "benchmarks.md", ROOT / "launch" / "results")
