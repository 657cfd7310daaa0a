"""A TorchServe handler as one writes it from the documentation: the yardstick of `benchmark.py serve`.

The image processor and the model of transformers with SDPA, half precision on a GPU, the documented recipe
for decoding, one request after the other.
"""

import io

import av
import numpy as np
import torch
from transformers import VivitForVideoClassification, VivitImageProcessor
from ts.torch_handler.base_handler import BaseHandler


class PlainHandler(BaseHandler):
    """Classifies uploaded videos: [{label: score}], the five best."""

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
        best = scores.topk(min(5, len(scores)))
        labels = [self.model.config.id2label[index] for index in best.indices.tolist()]
        return dict(zip(labels, best.values.tolist()))


def read_frames(file, num_frames):
    """`num_frames` arrays (height, width, 3), evenly spaced over the video."""
    with av.open(file) as container:
        # Some containers do not say how many frames there are.
        count = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        indices = np.linspace(0, count - 1, num_frames).astype(np.int64).tolist()
        container.seek(0)
        frames = {}
        for i, frame in enumerate(container.decode(video=0)):
            if i > indices[-1]:
                break
            if i in indices:
                frames[i] = frame.to_ndarray(format="rgb24")
    return [frames[i] for i in indices]
