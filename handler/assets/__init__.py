"""Paths of the files that the package ships: labels, protocol buffers, configuration templates, the demo."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent

LABELS = ASSETS / "labels"  # NAME.txt, one class name per line
METRICS = ASSETS / "metrics.yaml"  # every metric that TorchServe exports
MODEL_CONFIG = ASSETS / "model-config.yaml"  # travels in the archive
SERVER_CONFIG = ASSETS / "config.properties"  # TorchServe's settings
DEMO_CHECKPOINT = ASSETS / "demo" / "checkpoint"
DEMO_CLIPS = ASSETS / "demo" / "clips"
