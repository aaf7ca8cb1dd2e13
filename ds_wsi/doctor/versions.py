"""The installed packages against the bounds that ds_wsi was installed with."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ds_wsi.doctor.apart import finding_apart
from ds_wsi.doctor.finding import FAIL, PASS, WARN, Finding
from ds_wsi.runtime.seams import SEAMS, SEEN, missing_seams
from ds_wsi.runtime.words import counted

IMPORTS_S = 90
_INSTALL_ANEW = "pip install --force-reinstall what is named; torchvision must be the one of torch's release"


class Needed(NamedTuple):
    """A package that ds_wsi uses.

    Attributes:
        name: the distribution's.
        bounds: the bounds of its version.
        optional: whether it belongs to an extra.
    """

    name: str
    bounds: SpecifierSet
    optional: bool


def needed_packages() -> list[Needed]:
    """The requirements of the installed ds_wsi, in its order, each package once.

    Raises:
        PackageNotFoundError: ds_wsi runs from a folder that is not installed.
    """
    packages: dict[str, Needed] = {}
    for line in requires("ds_wsi") or []:
        one = Requirement(line)
        optional = one.marker is not None and "extra" in str(one.marker)
        if one.marker is None or optional or one.marker.evaluate():
            packages.setdefault(one.name, Needed(one.name, one.specifier, optional))
    return list(packages.values())


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions() -> Finding:
    """Whether Python and all packages are within ds_wsi's bounds; an optional package that is not only warns."""
    try:
        packages, python = needed_packages(), metadata("ds_wsi")["Requires-Python"] or ""
    except PackageNotFoundError:
        return Finding(WARN, "ds_wsi runs from a folder that is not installed", "pip install -e . in that folder")
    wrong, repairs, needed = [], [], False
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        return Finding(FAIL, f"Python {platform.python_version()}, not {python}", f"an environment of Python {python}")
    for name, bounds, optional in packages:
        installed = installed_version(name)
        if installed is None and optional:
            continue
        if installed is None or not bounds.contains(installed, prereleases=True):
            wrong.append(f"{name} {installed or 'not installed'}, not {bounds or 'there'}")
            repairs.append(f'"{name}{bounds}"')
            needed = needed or not optional
    if wrong:
        return Finding(FAIL if needed else WARN, "; ".join(wrong), f"pip install {' '.join(repairs)}")
    return Finding(PASS, f"{counted(len(packages), 'package')} within the bounds of ds_wsi {version('ds_wsi')}")


def check_imports() -> Finding:
    """Whether the packages can be imported, all in one process: a version can be right and its libraries missing."""
    try:
        names = {one.name.lower().replace("_", "-") for one in needed_packages() if not one.optional}
    except PackageNotFoundError:
        names = {"torch"}
    modules = sorted(
        module
        for module, owners in packages_distributions().items()
        if not module.startswith("_") and any(owner.lower().replace("_", "-") in names for owner in owners)
    )
    slow = f"run it again where the packages lie on a slow disk; {_INSTALL_ANEW}"
    return finding_apart(import_and_look, modules, timeout_s=IMPORTS_S, remedy=slow)


def import_and_look(modules: list[str]) -> Finding:
    """Import each module, and look for the private names of theirs that ds_wsi uses. In a process of its own."""
    imported = import_all(modules)
    if imported.status != PASS:
        return imported
    missing = [row for package in SEEN for row in missing_seams(package) if not row.since]
    if missing:
        packages = " ".join(f'"{name}=={SEEN[name][1]}"' for name in sorted({row.package for row in missing}))
        words = ", ".join(f"{row.dotted} ({row.purpose})" for row in missing)
        return Finding(FAIL, f"private names that ds_wsi uses are gone: {words}", f"pip install {packages}")
    return Finding(PASS, f"{imported.found}, {counted(len(SEAMS), 'private name')} there")


def import_all(modules: list[str]) -> Finding:
    """Import each module. In a process of its own: some crash it."""
    broken = []
    for name in modules:
        try:
            import_module(name)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            broken.append(f"{name} ({type(error).__name__}: {lines[0][:200]})")
    if broken:
        return Finding(FAIL, "; ".join(broken), _INSTALL_ANEW)
    return Finding(PASS, f"{counted(len(modules), 'module')} imported")
