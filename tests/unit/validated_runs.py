"""A small run, and a validation in the place of its own that gives the metrics it is told."""

from ds_wsi.cli import main
from ds_wsi.evaluation.norm_choice import NormChoice
from ds_wsi.evaluation.validator import ValidationResult

EPOCHS, STEPS = 3, 4


def train(manifest, tiles_dir, folder, *more, status=0):
    options = {"manifest": manifest, "tiles_dir": tiles_dir, "output_dir": folder, "tile_size_px": 64}
    options |= {"encoder": "resnet10t", "num_train_epochs": EPOCHS, "dataloader_num_workers": 0, "learning_rate": 0.01}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["train", *given, *more]) == status


def scripted(aucs, failures=None):
    """Stands for the validation of weights: the n-th has the n-th AUC."""
    left = iter(aucs)
    return lambda *_: ValidationResult(choice_of({"eval_loss": 0.1, "eval_auc": next(left)}), failures or {})


def choice_of(metrics):
    return NormChoice("running", {"running": metrics})
