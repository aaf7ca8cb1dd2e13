"""What a user asks of the norms: what they average over, in training and in evaluation."""

from dataclasses import dataclass

from ds_wsi.runtime.setting import SWITCH, Decides, setting

TRAINING = ("auto", "bag", "stack", "step", "frozen")
EVALUATION = ("auto", "running", "bag", "recalibrated")
POPULATIONS = {
    "bag": "each bag",
    "stack": "the bags of a micro-step",
    "step": "all bags of a step",
    "frozen": "nothing: it takes running statistics",
}
CANDIDATES = ("running", "recalibrated", "bag")  # in the order in which ties are decided


@dataclass(frozen=True)
class NormPolicy:
    """What the encoder's BatchNorm averages over: its population. Other norms have none and are left alone.

    Args:
        training: "bag": each bag by itself. "stack": the bags of one micro-step of one process, as Big-Layers has it.
            "step": all bags of the optimizer step, of all ranks and micro-steps. "frozen": the running statistics,
            which do not move. "auto": "frozen" where the encoder starts from weights, "step" where it starts from
            scratch.
        evaluation: "running": the running statistics. "bag": each slide's own, over all its tiles. "recalibrated":
            running statistics that are taken anew over the training slides with the final weights. "auto" measures
            these on the validation split after each epoch and exports the best.
        affine: whether the norms' weights and biases are trained under "frozen".
        recalibration_tiles: tiles of each training slide over which statistics are taken anew; 0 takes all.
    """

    training: str = setting(
        "auto",
        "what the encoder's BatchNorm averages over in training: each bag, a stack of bags, a step's bags, or "
        "nothing (frozen); auto decides by the weights, see docs/batchnorm.md",
        Decides.RESOLVED,
        resolved="norm_training",
        option="norm_training",
        kind=TRAINING,
    )
    evaluation: str = setting(
        "auto",
        "what the encoder's BatchNorm averages over in the exported model; auto takes the best on validation slides",
        Decides.RESULT,
        option="norm_evaluation",
        kind=EVALUATION,
        group="validation and test",
    )
    affine: bool = setting(
        True,
        "train the weights and biases of BatchNorm under --norm_training frozen",
        Decides.RESULT,
        option="norm_affine",
        kind=SWITCH,
    )
    recalibration_tiles: int = setting(
        16,
        "number of tiles of each training slide over which BatchNorm's statistics are taken anew; 0 takes all",
        Decides.RESULT,
        option="norm_recalibration_tiles",
        group="validation and test",
    )

    def __post_init__(self) -> None:
        """Refuse words that name no population."""
        for name, allowed in (("training", TRAINING), ("evaluation", EVALUATION)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"norm.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.recalibration_tiles < 0:
            raise ValueError(f"norm.recalibration_tiles must be at least 0, got {self.recalibration_tiles}")
        if not self.affine and self.training not in ("auto", "frozen"):
            raise ValueError(
                f'norm.affine must be true where norm.training is "{self.training}", got false. '
                'HINT: norm.training "frozen" trains a norm without its weights.'
            )


def natural_evaluation(training: str, bags: int) -> str:
    """How a model is evaluated that was trained so, where nothing was measured.

    A population of one bag is that bag, whatever it is called: running statistics are those of another model.

    Args:
        training: "bag", "stack", "step" or "frozen".
        bags: how many are in the population of training; of no matter where norms are frozen.
    """
    return "bag" if training == "bag" or (training != "frozen" and bags <= 1) else "running"
