"""Blocks of code in README and docs: each has a name, `<!-- code: name -->`, or a reason why none runs it."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "sh", "shell", "console", "json", "yaml", "toml", "diff")  # what must be named
OTHERS = ("text", "csv")  # messages and layouts of folders; tables, which tests of tables read
CI = "ci: test"  # the block that .ci/run runs


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        comment: what the HTML comment right above it says; "" where there is none.
    """

    page: str
    comment: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """The name under which a test runs it; "" where none does."""
        return self.comment.removeprefix("code: ") if self.comment.startswith("code: ") else ""

    @property
    def reason(self) -> str:
        """Why no test of this file runs it; "" where one does."""
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run: ") else ""


def blocks() -> list[Block]:
    """The blocks of all pages, in their order."""
    listed = []
    for page in PAGES:
        fences = re.finditer(r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
        listed += [Block(page.relative_to(ROOT).as_posix(), one[1] or "", one[2], one[3]) for one in fences]
    return listed


def unnamed(found: Iterable[Block]) -> list[Block]:
    """Those of a language that runs, which have neither a name nor a reason."""
    return [one for one in found if one.language in LANGUAGES and not (one.name or one.reason or one.comment == CI)]


def block(name: str) -> Block:
    """The one of this name."""
    (named,) = [one for one in blocks() if one.name == name]
    return named


def commands(text: str) -> list[str]:
    """The commands of a block of shell, a line each, without comments."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def templates() -> Iterator[str]:
    """Regular expressions of the package's strings, `.*?` in the place of what they are filled with."""
    for path in sorted((ROOT / "ds_wsi").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            fixed = [word for word in words if isinstance(word, str)]
            if sum(map(len, fixed)) >= 18 and all(isinstance(word, str | None) for word in words):
                yield "".join(".*?" if word is None else _fillable(str(word)) for word in words)


def _fillable(words: str) -> str:
    return re.sub(r"%(\.?\d*[a-z])", ".*?", re.escape(words).replace(r"\.", ".").replace("%%", "%"))
