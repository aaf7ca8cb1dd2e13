"""`ds-wsi env`: versions, devices, cores and memory, as an issue report wants them."""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ds_wsi.commands.parser import add_command
from ds_wsi.doctor.machine import describe_machine
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.units import format_bytes


def add_env(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi env`."""
    parser = add_command(subparsers, "env", run_env)
    parser.add_argument("--json", action="store_true", help="print JSON (default: a line per value)")


def run_env(options: argparse.Namespace) -> None:
    """`ds-wsi env`."""
    machine = describe_machine()
    if options.json:
        show(json.dumps(machine, indent=2))
        return
    lines = list(_lines(machine))
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        show(f"{name:<{width}}{value}")


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each value, names of nested ones joined by spaces."""
    for key, value in values.items():
        name = f"{prefix}{key.removesuffix('_bytes') if key != 'bytes' else 'size'}"
        if isinstance(value, Mapping):
            yield from _lines(value, "" if key == "packages" else f"{key} ")
        elif isinstance(value, list):
            for index, one in enumerate(value):
                yield from _lines(one, f"cuda:{index} ")
            if not value:
                yield name, "none"
        else:
            is_size = key.endswith("bytes") and value is not None
            yield name, format_bytes(value) if is_size else "none" if value is None else str(value)
