"""Modules of earlier versions that lie elsewhere now: scripts that name them still run, and are told the new place."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

# Below ds_wsi: the module of an earlier version, and where its names are today, the first one asked first.
MOVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "engines.accelerate": ("engines.accelerator.engine", "runtime.choices"),
        "engines.cpu": ("engines.machine.cpu", "engines.machine.ops"),
        "engines.deepspeed": ("engines.sharded.zero", "engines.deepspeed_json.config"),
        "engines.fsdp": ("engines.sharded.fsdp",),
        "engines.hooks": ("engines.comm_hooks.register", "engines.initialize"),
        "engines.nvme": ("engines.machine.nvme",),
        "engines.scope": ("engines.accelerator.scope",),
        "engines.step_batches": ("engines.hf.step_batches",),
        "engines.stepper": ("engines.accelerator.stepper",),
        "engines.trainer": ("engines.hf.trainer",),
        "engines.transformers": ("engines.hf.models",),
        "partition.check": ("partition.checking.check",),
        "partition.halo": ("partition.graph.halo",),
        "partition.paper": ("partition.execution.paper",),
        "partition.plan": ("partition.planning.plan",),
        "partition.planner": ("partition.planning.search", "runtime.memory"),
        "partition.rates": ("partition.planning.rates",),
        "partition.saved_on_host": ("partition.execution.saved_on_host",),
        "partition.simulate": ("partition.planning.simulate",),
        "partition.staging": ("partition.execution.host_store", "partition.execution.free_list"),
        "partition.trace": ("partition.graph.trace",),
        "tile_parallel.norm": ("norms.shared",),
        "training.choices": ("training.settings.optim",),
    }
)


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` once no other finder does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's: what makes the module, or None where the name has not moved."""
        package, _, below = name.partition(".")
        return ModuleSpec(name, self) if package == "ds_wsi" and below in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Python's: give the module the names of today's ones, each imported when it is asked for."""
        modules = [f"ds_wsi.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        warnings.warn(
            f"{module.__name__} has moved: import from {' or '.join(modules)}, or what README lists from ds_wsi",
            FutureWarning,
            stacklevel=2,  # who imports: Python skips the frames of its import system
        )
        module.__doc__ = f"Moved to {' and '.join(modules)}."
        module.__dict__["__getattr__"] = _getattr_of(module.__name__, modules)


def _getattr_of(name: str, modules: Sequence[str]) -> Callable[[str], Any]:
    def find(attribute: str) -> Any:
        if not attribute.startswith("__"):
            for module in map(import_module, modules):
                if hasattr(module, attribute):
                    return getattr(module, attribute)
        raise AttributeError(f"module {name!r}, now {' and '.join(modules)}, has no attribute {attribute!r}")

    return find


def find_moved_modules() -> None:
    """Let imports of modules that have moved be found, once per process."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
