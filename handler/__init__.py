"""ViViT video classification: the model, with the class names of transformers, and a TorchServe handler."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handler.classification import Classification
    from handler.classifier import VideoClassifier
    from handler.explanation.result import Explanation
    from handler.models.config import VivitConfig
    from handler.models.vivit import VivitForVideoClassification, VivitModel
    from handler.processing.image_processor import VivitImageProcessor
    from handler.video import read_video_pyav, sample_frame_indices

# A literal, because setup.cfg reads it without importing the package. It is part of the archive.
__version__ = "0.2.0"

__all__ = [
    "Classification",
    "Explanation",
    "VideoClassifier",
    "VivitConfig",
    "VivitForVideoClassification",
    "VivitImageProcessor",
    "VivitModel",
    "read_video_pyav",
    "sample_frame_indices",
]

_LAZY_EXPORTS = {
    "Classification": "handler.classification",
    "Explanation": "handler.explanation.result",
    "VideoClassifier": "handler.classifier",
    "VivitConfig": "handler.models.config",
    "VivitForVideoClassification": "handler.models.vivit",
    "VivitImageProcessor": "handler.processing.image_processor",
    "VivitModel": "handler.models.vivit",
    "read_video_pyav": "handler.video",
    "sample_frame_indices": "handler.video",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: decoder processes and the command line import this package and do not need torch.
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
