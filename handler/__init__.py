"""ViViT video classification under the names that users of transformers know, and a TorchServe handler for it."""

import importlib

_LAZY_EXPORTS = {
    "Classification": "handler.classifier",
    "VideoClassifier": "handler.classifier",
    "VivitConfig": "handler.models.config",
    "VivitForVideoClassification": "handler.models.vivit",
    "VivitImageProcessor": "handler.processing.image_processor",
    "VivitModel": "handler.models.vivit",
    "read_video_pyav": "handler.video",
    "sample_frame_indices": "handler.video",
}
__all__ = sorted(_LAZY_EXPORTS)


def __getattr__(name: str):
    # Imported when asked for: the processes that decode import this package too, and have no use for torch.
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
