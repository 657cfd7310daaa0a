"""Paths of the data files in the package: labels, protocol buffers, configuration templates and the demo."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent

LABELS = ASSETS / "labels"  # NAME.txt with one class name per line
METRICS = ASSETS / "metrics.yaml"  # the metrics that TorchServe exports
MODEL_CONFIG = ASSETS / "model-config.yaml"  # the default for archives
SERVER_CONFIG = ASSETS / "config.properties"  # TorchServe's settings
DEMO_CHECKPOINT = ASSETS / "demo" / "checkpoint"
DEMO_CLIPS = ASSETS / "demo" / "clips"
