"""All models of the zoo, by key."""

from . import pathology_models, timm_models, torchvision_models, transformers_models
from .entry import ZooModel

MODELS: dict[str, ZooModel] = {
    model.key: model
    for library in (pathology_models, timm_models, torchvision_models, transformers_models)
    for model in library.models()
}
