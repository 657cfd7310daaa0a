"""The classifier on a GPU: precision, batches, compilation, memory and a broken context."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from demo.evaluate import draw_independent_clip
from handler import VideoClassifier
from handler.assets import DEMO_CHECKPOINT
from handler.inference import is_out_of_memory
from handler.options import HandlerOptions
from tests.gpu.conftest import relative_error, repeated
from tests.support.server import ROOT

# Relative error of the logits of 12 layers with random weights.
MAX_ERRORS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
DEMO_CLIPS = 54


# Precision


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", MAX_ERRORS)
def test_logits_close_to_float32_on_cpu(load, clips, expected, dtype, attn_implementation):
    logits = load(dtype=dtype, attn_implementation=attn_implementation).logits(clips)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert relative_error(logits, expected) < MAX_ERRORS[dtype]


@pytest.fixture(scope="module")
def demo_clips():
    """(clips, indices of their labels) of a renderer that training did not use."""
    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT, options=HandlerOptions(dtype="float32"))
    drawn = [draw_independent_clip(0, number) for number in range(DEMO_CLIPS)]
    clips = [classifier.load_clip(clip.video).pixels for clip in drawn]
    return clips, torch.tensor([classifier.config.label2id[clip.label] for clip in drawn])


@pytest.fixture(scope="module")
def demo_logits(demo_clips):
    """Logits of the demo's clips in float32 on the CPU."""
    options = HandlerOptions(dtype="float32")
    return VideoClassifier.from_pretrained(DEMO_CHECKPOINT, options=options).logits(demo_clips[0])


@pytest.mark.parametrize("dtype", MAX_ERRORS)
def test_demo_answers_as_in_float32_on_cpu(device, demo_clips, demo_logits, dtype):
    clips, labels = demo_clips
    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT, options=HandlerOptions(dtype=dtype), device=device)
    logits = classifier.logits(clips)
    assert relative_error(logits, demo_logits) < MAX_ERRORS[dtype]
    changed = logits.argmax(-1) != demo_logits.argmax(-1)  # (DEMO_CLIPS,)
    best_two = demo_logits[changed].topk(2).values  # only where two labels are about equally likely
    assert (best_two[:, 0] - best_two[:, 1] < 0.2).all() and changed.sum() <= 1
    assert (logits.argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.needs_cuda
def test_dtype_auto_is_float16(load):
    assert load().dtype is torch.float16


# Batches


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 16, 31, 32])
def test_batch_size_does_not_change_logits(load, clips, expected, count):
    logits = load(micro_batch_clips=32, dtype="float16").logits(repeated(clips, count))
    assert relative_error(logits, expected[torch.arange(count) % len(clips)]) < MAX_ERRORS["float16"]


def test_page_locked_buffers_hold_their_own_clips(load, clips, expected):
    """Micro-batches are copied asynchronously from buffers that later ones reuse."""
    classifier = load(micro_batch_clips=1, dtype="float32")
    for count in (32, 5, 32):
        logits = classifier.logits(repeated(clips, count))
        assert relative_error(logits, expected[torch.arange(count) % len(clips)]) < MAX_ERRORS["float32"]


def test_compiled_model_compiles_nothing_in_requests(load, clips, expected):
    torch._dynamo.reset()
    classifier = load(compile=True, micro_batch_clips=2, dtype="float16")
    classifier.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    for count in (1, 2, 3, 4):
        assert relative_error(classifier.logits(clips[:count]), expected[:count]) < MAX_ERRORS["float16"]
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs


# Out of memory


@contextlib.contextmanager
def allocator_limit(usable_bytes):
    """Limits what torch may allocate in total."""
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(usable_bytes / total_bytes)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def full_card(usable_bytes):
    """Allocates the card's memory, except for what torch may allocate in total."""
    torch.cuda.empty_cache()
    missing_bytes = usable_bytes - torch.cuda.memory_reserved()
    occupied = torch.empty(torch.cuda.mem_get_info()[0] - missing_bytes, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del occupied
        torch.cuda.empty_cache()


def peak_bytes(classifier, clips):
    """Memory that torch reserves for the logits of a micro-batch, with everything else."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    classifier.logits(clips)
    return torch.cuda.max_memory_reserved()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("shortage", [allocator_limit, full_card])
def test_micro_batch_halved_when_memory_is_exhausted(load, clips, expected, shortage, caplog):
    classifier = load(dtype="float32", micro_batch_clips=16)
    enough, too_little = peak_bytes(classifier, repeated(clips, 4)), peak_bytes(classifier, repeated(clips, 16))
    assert too_little > 1.2 * enough
    torch.cuda.empty_cache()
    with shortage(int(1.1 * enough)):
        for is_split in (True, False):
            caplog.clear()
            logits = classifier.logits(repeated(clips, 16))
            assert relative_error(logits, expected.repeat(4, 1)) < MAX_ERRORS["float32"]
            # The second call starts with a smaller size.
            assert ("a micro-batch of 16 views failed and is split" in caplog.text) == is_split


@pytest.mark.needs_cuda
def test_single_clip_out_of_memory_fails_alone(load, clips, expected):
    classifier = load(dtype="float32")
    classifier.logits(clips[:1])
    torch.cuda.empty_cache()
    with allocator_limit(torch.cuda.memory_reserved()):
        errors = classifier.logits_or_errors(clips[:2])
    assert all(isinstance(error, Exception) and is_out_of_memory(error) for error in errors), errors
    assert relative_error(classifier.logits(clips), expected) < MAX_ERRORS["float32"]


# A broken context

BREAK_CONTEXT = """
import sys
import numpy as np
import torch
from handler import VideoClassifier
from handler.inference import DeviceError

classifier = VideoClassifier.from_pretrained(sys.argv[1], device="cuda")
config = classifier.config
clip = np.zeros((1, config.num_frames, 3, config.image_height, config.image_width), np.uint8)
classifier.logits([clip])
torch.zeros(1, device="cuda")[torch.tensor([9], device="cuda")]  # fails in the kernel, after this line
try:
    classifier.logits([clip, clip])
except DeviceError as error:
    print("DeviceError:", error, flush=True)
"""


@pytest.mark.needs_cuda
def test_failed_kernel_raises_device_error(checkpoint):
    """In a process of its own, because its context cannot be used afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", BREAK_CONTEXT, str(checkpoint)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("DeviceError: cuda no longer works: "), done
