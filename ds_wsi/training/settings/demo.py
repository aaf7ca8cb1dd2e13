"""What a run on the demo cohort takes where nothing is said of it: a model that is trained within minutes."""

from collections.abc import Collection
from typing import Any

ENCODER, EPOCHS = "resnet10t", 4
# Whoever gives one of these has another encoder in mind; on features there is none.
OTHERWISE = (
    *("data.manifest", "data.features_dir", "model.encoder", "model.encoder_weights", "model.pretrained"),
    *("model.encoder_features", "model.encoder_options"),
)


def demo_defaults(given: Collection[str], demo: str) -> dict[str, Any]:
    """Field -> value of the demo "plain", where its encoder is not said otherwise; else nothing.

    Args:
        given: fields ("model.encoder") that have a value already.
        demo: the demo cohort.
    """
    if demo != "plain" or not set(given).isdisjoint(OTHERWISE):
        return {}
    return {"model.encoder": ENCODER, "optim.num_train_epochs": EPOCHS}
