"""The baseline of `benchmark.py serve`: a TorchServe handler made of transformers' parts.

It uses transformers' image processor and model with SDPA attention, half precision on a GPU, and the decoding
code of the ViViT documentation, and handles the requests of a batch one after the other.
"""

import io

import av
import numpy as np
import torch
from transformers import VivitForVideoClassification, VivitImageProcessor
from ts.torch_handler.base_handler import BaseHandler

TOP_K = 5


class TransformersHandler(BaseHandler):
    """Returns {label: score} of the five best labels for each uploaded video."""

    def initialize(self, context):
        model_dir, gpu_id = context.system_properties["model_dir"], context.system_properties.get("gpu_id")
        on_gpu = torch.cuda.is_available() and gpu_id is not None
        self.device = torch.device(f"cuda:{gpu_id}" if on_gpu else "cpu")
        self.dtype = torch.float16 if on_gpu else torch.float32
        self.processor = VivitImageProcessor.from_pretrained(model_dir)
        self.model = VivitForVideoClassification.from_pretrained(
            model_dir, attn_implementation="sdpa", torch_dtype=self.dtype
        )
        self.model.to(self.device).eval()
        self.initialized = True

    def handle(self, data, context):
        return [self.classify(row.get("data") or row.get("body")) for row in data]

    @torch.inference_mode()
    def classify(self, video):
        frames = read_frames(io.BytesIO(video), self.model.config.num_frames)
        inputs = self.processor(frames, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        scores = self.model(inputs).logits[0].float().softmax(-1)
        best = scores.topk(min(TOP_K, len(scores)))
        labels = [self.model.config.id2label[index] for index in best.indices.tolist()]
        return dict(zip(labels, best.values.tolist()))


def read_frames(file, num_frames):
    """Returns `num_frames` frames at uniform distances, uint8 (H, W, 3) each."""
    with av.open(file) as container:
        # Some containers do not state the number of frames.
        count = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        indices = np.linspace(0, count - 1, num_frames).astype(np.int64).tolist()
        container.seek(0)
        frames = {}
        for index, frame in enumerate(container.decode(video=0)):
            if index > indices[-1]:
                break
            if index in indices:
                frames[index] = frame.to_ndarray(format="rgb24")
    return [frames[index] for index in indices]
