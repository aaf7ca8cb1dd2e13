"""Scripts that name modules by their earlier places still run, and are told the new ones."""

import importlib
import subprocess
import sys

import pytest

from ds_wsi.runtime.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_earlier_place_is_found_and_holds_todays_names(old):
    sys.modules.pop(f"ds_wsi.{old}", None)
    with pytest.warns(FutureWarning, match=f"ds_wsi.{old} has moved: import from ds_wsi.{MOVED[old][0]}"):
        module = importlib.import_module(f"ds_wsi.{old}")
    seen = set()
    for module_name in MOVED[old]:
        today = importlib.import_module(f"ds_wsi.{module_name}")
        names = {name for name in vars(today) if not name.startswith("_")} - seen
        assert names, module_name
        for name in names:
            assert getattr(module, name) is getattr(today, name)
        seen |= names
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        module.nowhere  # noqa: B018


def test_every_form_of_import_finds_it_and_the_warning_is_at_the_import():
    script = (
        "from ds_wsi.partition import staging\n"
        "from ds_wsi.partition.staging import HostStore\n"
        "import ds_wsi.engines.cpu as cpu\n"
        "import ds_wsi.engines.machine.cpu\n"
        "assert staging.HostStore is HostStore\n"
        "assert cpu.trainer_arguments is ds_wsi.engines.machine.cpu.trainer_arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("<string>:1: FutureWarning: ds_wsi.partition.staging has moved") == 1
    assert done.stderr.count("<string>:3: FutureWarning: ds_wsi.engines.cpu has moved") == 1


def test_what_never_was_is_not_found():
    for name in ("ds_wsi.partition.nowhere", "ds_wsi.staging", "ds_wsi_other.partition.staging"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
