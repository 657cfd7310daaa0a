"""ViViT video classification under the names that users of transformers know, and a TorchServe handler for it."""
from handler.config import VivitConfig
from handler.image_processor import VivitImageProcessor
from handler.model import VivitForVideoClassification, VivitModel
from handler.video import read_video_pyav, sample_frame_indices

__all__ = [
    "VivitConfig",
    "VivitForVideoClassification",
    "VivitImageProcessor",
    "VivitModel",
    "read_video_pyav",
    "sample_frame_indices",
]
