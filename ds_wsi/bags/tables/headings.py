"""Headings of a table: which are known, which are other spellings of known ones, and which are not used."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

COLUMNS = ("slide_id", "path", "label", "patient_id", "split", "mpp", "center")
NEAR = 0.8  # of difflib's ratio
# In lower case, without blanks and signs. What other projects and clinical tables call these columns.
_WORDS = {
    "slide_id": "slide slides slidename slideids wsi wsiid wsiname image imageid imagename",
    "path": "filename file filepath fullpath paths slidepath wsipath imagepath slidefile pathtoslide svspath location",
    "label": "labels class classes classlabel target category diagnosis groundtruth outcome y slidelabel isupgrade "
    "subtype",
    "patient_id": "patient patients case caseid cases caseids subject subjectid patientname patientcode patientbarcode "
    "bcrpatientbarcode casesubmitterid participant participantid",
    "split": "fold folds splits set subset partition phase trainvaltest traintest splitset",
    "mpp": "mppx mppy resolution micronsperpixel micronperpixel umperpx umperpixel umpx pixelsize spacing pixelspacing",
    "center": "centre",
}
SYNONYMS: Mapping[str, tuple[str, ...]] = {known: tuple(words.split()) for known, words in _WORDS.items()}
# As pandas names the columns that a join found twice.
_JOINED = re.compile(r"(.+?)(?:\.\d+|_x|_y|_left|_right)")


def plain(heading: str) -> str:
    """A heading in lower case, without blanks and signs."""
    return re.sub(r"[\W_]+", "", heading).lower()


def meant(heading: str) -> str | None:
    """The known column that a heading probably means; None for one that is known, or means something else."""
    name = plain(heading)
    if heading in COLUMNS or not name:
        return None
    for known, words in SYNONYMS.items():
        if name == plain(known) or name in words or re.fullmatch(rf"(?:{'|'.join(words)})\d+", name):
            return known
    near = difflib.get_close_matches(name, [plain(known) for known in COLUMNS], 1, NEAR)
    return next((known for known in COLUMNS if near and plain(known) == near[0]), None)


def heading_problems(headings: Sequence[str], used: Collection[str]) -> list[str]:
    """What is wrong with headings: a column that is used under another spelling, or beside another spelling of it.

    Args:
        headings: the table's, each once.
        used: those of `COLUMNS` on which the command's result depends.
    """
    problems = []
    for heading in headings:
        joined = _JOINED.fullmatch(heading)
        beside = joined[1] if joined and joined[1] in COLUMNS and joined[1] != "mpp" else None  # mpp_x is an axis'
        if beside is None and plain(heading) in map(plain, COLUMNS) and heading not in COLUMNS:
            beside = next(known for known in COLUMNS if plain(known) == plain(heading))
        if beside in headings and beside in used and beside != heading:
            problems.append(
                f"column {beside} must be given once, got {heading!r} beside it. HINT: delete or rename {heading!r}."
            )
            continue
        known = beside or meant(heading)
        if known in used and known not in headings:
            problems.append(
                f"column {known} must be written so, got {heading!r}. "
                f"HINT: rename it to {known}, or, where it is something else, to what is none of {', '.join(COLUMNS)}."
            )
    return problems


def missing_hint(column: str, headings: Sequence[str]) -> str:
    """What to do about a column that is not there."""
    likely = [heading for heading in headings if meant(heading) == column or plain(heading) == plain(column)]
    if column == "slide_id" and not likely:  # a file's name can name the slide
        likely = [heading for heading in headings if meant(heading) == "path"]
    if likely:
        return f"rename {likely[0]!r} to {column}"
    if column == "slide_id" and "PATIENT" in headings:
        return "STAMP's clini table needs its slide table: clini.csv,slide.csv"
    if not any(heading in COLUMNS or meant(heading) for heading in headings):
        return "the first row must hold the headings, divided by commas, semicolons or tabs"
    if column == "path":
        return (
            "add a column path with each slide's file; `ds-wsi manifest custom --data_dir FOLDER --labels TABLE` finds "
            "the files and writes it (--slide_column, --label_column and --patient_column name its headings)"
        )
    return f"add the column {column}, or rename the one that holds it"


def unused(headings: Sequence[str]) -> list[str]:
    """The headings that are not known, in the table's order; a column without a heading is left out."""
    return [heading for heading in headings if heading not in COLUMNS and heading]
