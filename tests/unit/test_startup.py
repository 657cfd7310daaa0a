"""What the start of a worker imports and runs, without measuring time."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Serving needs none of them, and importing each takes 20 ms to several seconds.
HEAVY_MODULES = {
    "google.protobuf",
    "grpc",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "model_archiver",
    "pandas",
    "requests",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "tqdm.auto",
    "transformers",
}

# Starts a worker as TorchServe does, then classifies a clip and rejects an invalid one.
WORKER = """
import sys
import ts.model_service_worker
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service
from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS, METRICS
from handler.vivit_handler import VivitHandler

metrics = MetricsCacheYamlImpl(config_file_path=str(METRICS))
metrics.initialize_cache()
metrics.model_name = "demo"
handler = VivitHandler()
service = Service("demo", str(DEMO_CHECKPOINT), {}, handler.handle, None, 1, metrics_cache=metrics)
service.set_cl_socket(None)
handler.initialize(service.context)
at_ready = set(sys.modules)

def predict(content):
    part = {"name": "body", "value": content, "contentType": None}
    return service.predict([{"requestId": b"1", "headers": [], "parameters": [part]}])

assert b'"moving left"' in predict((DEMO_CLIPS / "moving-left.mp4").read_bytes())
assert b'"not_a_video"' in predict(b"text")
handler.decoders.close()
print("ready:", *at_ready)
print("later:", *set(sys.modules) - at_ready)
"""


def modules_of(code: str) -> dict[str, set[str]]:
    """The module names that a program prints, in lines `NAME: MODULE MODULE ...`, by NAME."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(":") for line in done.stdout.splitlines()]
    return {name: set(modules.split()) for name, _, modules in lines}


def test_worker_starts_without_heavy_modules_and_requests_import_nothing():
    modules = modules_of(WORKER)
    assert "handler.classifier" in modules["ready"]
    assert HEAVY_MODULES & modules["ready"] == set()
    assert modules["later"] == set()


def test_decoding_without_server_starts_before_torch_is_imported():
    code = """
import sys
from handler.assets import DEMO_CLIPS
from handler.cli.main import main
from handler.sandbox import DecoderPool

class Pool(DecoderPool):
    def __init__(self, *args, **options):
        print("at start:", *sys.modules)
        super().__init__(*args, **options)

import handler.cli.local
handler.cli.local.DecoderPool = Pool
assert main(["classify", "--checkpoint", "demo", str(DEMO_CLIPS / "moving-left.mp4")]) == 0
print("at end:", *sys.modules)
"""
    modules = modules_of(code)
    assert "torch" not in modules["at start"]
    assert HEAVY_MODULES & modules["at end"] == set()


def test_commands_and_configurations_are_read_without_torch():
    code = (
        "import sys, handler.cli.main, handler.cli.classify, handler.options, handler.models.config, "
        "handler.processing.image_processor, handler.sandbox.process; print('imported:', *sys.modules)"
    )
    assert {"torch", "ts", *HEAVY_MODULES} & modules_of(code)["imported"] == set()
