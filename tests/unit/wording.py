"""The wording of code: rules for docstrings, comments, messages and names, and where a file breaks them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# A docstring's first line and each entry has a subject; these words begin a line without one.
BARE_FIRST_WORDS = frozenset(
    {"of", "to", "which", "its", "whose", "that", "as", "such", "with", "without"}
) | frozenset({"at", "by", "for", "from", "in", "into", "on", "under", "after", "before", "since", "until"})
ENTRY_SECTIONS = ("Args:", "Attributes:")
TEXT_SECTIONS = ("Returns:", "Yields:")

COUNTED = (
    "tiles?|bags?|slides?|bytes?|rows?|pixels|px|um|steps?|micro-steps?|micro-batch(?:es)?|values?|numbers?|ranks?|"
    "process(?:es)?|one|names|one name|polic(?:y|ies)|curves?|latency L|threads?|times|once|twice|seconds|samples?|"
    "gathers?|records?|cohorts?|weights?|index|mappings?|lines?|files?|calls?|draws?|cells?|tensors?|exchanges?|manifests?|CSV|requests?|collectives?|bits|floats|"
    "[GMk]i?B|ms|tables?|folders?|columns?|cores?|tasks?|pass(?:es)?|logits?"
)
UNITS = (
    "chunk|step|slide|bag|rank|process|tile|micro-step|worker|request|stack|channel|second|group|pixel|row|node|epoch|"
    "layer|bucket|minute|hour|patient|predicted class|class|value|device|file|parameter|entry|gradient|image|batch|"
    "call|pass|run|fold|seed|dataset|GPU|CPU|core|machine|level|segment|block|split|cohort|cell|task|metric|line|"
    "method|key|kind|folder|feature|array|instance|variant|message|label|number|tensor|module|norm"
)
# Not "give every rank a tile", nor "which bags a rank reads".
A_FOR_PER = re.compile(
    rf"(?<!every )(?<!each )(?<!which )\b(?:{COUNTED}) an? (?:{UNITS})\b"
    r"(?!'| (?:at (?:a time|once|each|every)|that|has|had|is|was|gets|holds)\b)"
)
VERBS = (
    "is|are|was|were|has|have|had|can|cannot|may|must|does|do|did|will|would|covers?|needs?|enters?|begins?|names?|takes?|"
    "goes|holds?|knows?|reads?|keeps?|makes?|gives?|tells?|costs?|ends?|comes?|stands?|plans?"
)
PLAIN = r"(?!(?:that|which|whose|who|where|when|what)\b)[\w-]+"  # no word that begins a clause
FOR_AS_BECAUSE = re.compile(
    r"[,;:] for (?:it|they|there|nothing|he|we|neither)\b(?! of\b)"
    r"|[,;:] for (?:the|an?|its|their|each|some|any|these|this|all|that|no|one|[\w-]+s)"
    rf"(?: {PLAIN}){{0,4}}? (?:{VERBS})\b"
    r"|\b[Hh]ere,? for\b"
)

# Names that say nothing of what they hold.
EMPTY_NAMES = frozenset(("found", "place", "own", "known", "wanted", "theirs", "ours"))


class Fault(NamedTuple):
    """A place in a file whose wording breaks a rule."""

    line: int
    rule: str  # "subject", "per", "because" or "name"
    words: str


def faults(source: str) -> list[Fault]:
    """Where Python source breaks a rule of wording, by line."""
    tree = ast.parse(source)
    texts = [*_strings(tree), *_comments(source)]
    return sorted(
        [
            *(Fault(line, "subject", words) for line, words in _without_subject(tree)),
            *(fault for line, text in texts for fault in text_faults(text, line)),
            *(Fault(line, "name", words) for line, words in _empty_names(tree)),
        ]
    )


def text_faults(text: str, first_line: int = 1) -> Iterator[Fault]:
    """Where prose says "a" for "per" or "for" for "because"; a break of the line is a blank."""
    flat = re.sub(r"\s", " ", text)
    flat = re.sub(r"(?<= ) +", lambda blanks: "\0" * len(blanks[0]), flat)
    kept = [index for index, char in enumerate(flat) if char != "\0"]
    words = "".join(flat[index] for index in kept)
    for rule, pattern in (("per", A_FOR_PER), ("because", FOR_AS_BECAUSE)):
        for match in pattern.finditer(words):
            line = first_line + text.count("\n", 0, kept[match.start()])
            yield Fault(line, rule, words[max(match.start() - 40, 0) : match.end() + 20].strip())


def _without_subject(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                for line, text in _statements(docstring):
                    if text.split(" ")[0].strip(",;:.").lower() in BARE_FIRST_WORDS:
                        yield node.body[0].lineno + line, text


def _statements(docstring: str) -> Iterator[tuple[int, str]]:
    """A docstring's first line and the text of its entries, each with its line."""
    section = ""
    for number, line in enumerate(docstring.splitlines()):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if number == 0:
            yield number, text
        elif indent == 0:
            section = text
        elif indent == 4 and section in ENTRY_SECTIONS and re.match(r"[\w*]+(?:, [\w*]+)*(?: \(.*?\))?: ", text):
            yield number, text.split(": ", 1)[1]
        elif indent == 4 and section in TEXT_SECTIONS:
            yield number, text
            section = ""


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    parts_of_others = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in parts_of_others:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "_" for part in node.values)
            yield node.lineno, "".join(map(str, parts)).replace("\n", " ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments, those of adjacent lines as one text."""
    first, last, lines = 0, -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if line != last + 1:
                yield first, "\n".join(lines)
                first, lines = line, []
            lines.append(token.string.removeprefix("#"))
            last = line
    yield first, "\n".join(lines)


def _empty_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of values that say nothing of them; a public function's parameters and a class's fields may keep theirs."""
    public = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.startswith("__"))
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    }
    fields = {
        id(field.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES:
            if id(node) in fields:
                continue
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in EMPTY_NAMES and id(node) not in public:
            yield node.lineno, node.arg


@cache
def file_faults(path: Path) -> list[Fault]:
    """Where a file, read once, breaks a rule: all rules in Python, those of prose in Markdown."""
    text = path.read_text("utf-8")
    return faults(text) if path.suffix == ".py" else sorted(text_faults(text))
