"""A run's settings in words: all of them, and those that differ from the defaults."""

from dataclasses import asdict, replace
from typing import Any

from ds_wsi.config import write_section
from ds_wsi.slides.policy import DEMO_TILE_SIZE_PX
from ds_wsi.training.setting_list import SETTINGS
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.settings.demo import ENCODER, EPOCHS


def all_settings(settings: TrainSettings) -> dict[str, Any]:
    """Field ("optim.learning_rate") -> value, without the layers of a partition plan."""
    by_field: dict[str, Any] = {}
    for group in ("data", "task", "model", "optim", "run"):
        by_field |= {f"{group}.{name}": value for name, value in asdict(getattr(settings, group)).items()}
    for policy, values in write_section(settings.policies).items():
        by_field |= {f"policies.{policy}.{name}": value for name, value in values.items() if name != "plan"}
    return by_field


def changed_settings(settings: TrainSettings) -> dict[str, str]:
    """Name -> value of the settings that are not the defaults; an option's name where there is one."""
    usual = TrainSettings()
    if settings.data.manifest is None:  # the demo's tiles have a size of their own, and "plain" a model
        tiling = replace(usual.policies.tiling, tile_size_px=DEMO_TILE_SIZE_PX)
        usual = replace(usual, policies=replace(usual.policies, tiling=tiling))
        if settings.data.demo == "plain" and settings.data.features_dir is None:
            usual = replace(usual, model=replace(usual.model, encoder=ENCODER))
            usual = replace(usual, optim=replace(usual.optim, num_train_epochs=EPOCHS))
    defaults = all_settings(usual)
    return {
        setting_name(field_path): str(value)
        for field_path, value in all_settings(settings).items()
        if field_path not in defaults or value != defaults[field_path]
    }


def setting_name(field_path: str) -> str:
    """The option that sets a field, or the field's own name."""
    declared = SETTINGS.get(field_path)
    return f"--{declared.setting.option}" if declared and declared.setting.option else field_path
