"""Archives, videos and the server that several files share; each test process makes its own."""

import shutil

import pytest

from handler.cli.build import build_archive
from tests.support.clips import numbered_frames, write_clip
from tests.support.server import running_server

MAX_UPLOAD_BYTES, MAX_DECODE_S, MAX_FRAMES = 8_000_000, 5, 20_000
MODEL_CONFIG = f"""
responseTimeout: 120
startupTimeout: 120
handler:
  dtype: float32  # exact on any processor
  decode_processes: 2
  max_upload_bytes: {MAX_UPLOAD_BYTES}
  max_decode_s: {MAX_DECODE_S}
  max_frames: {MAX_FRAMES}
  max_decode_gigapixels: 500
"""


@pytest.fixture(scope="session")
def store(checkpoint, tmp_path_factory):
    """Model store: vivit.mar is version 1.0 with labels LABEL_n, vivit-2.0.mar is version 2.0 with labels NEW_n."""
    folder = tmp_path_factory.mktemp("archives")
    config, labels = folder / "model-config.yaml", folder / "labels.txt"
    config.write_text(MODEL_CONFIG)
    labels.write_text("".join(f"NEW_{index}\n" for index in range(9)))
    store = folder / "store"
    options = {"checkpoint": str(checkpoint), "name": "vivit", "config": config}
    build_archive(**options, version="1.0", export_path=store)
    new = build_archive(**options, version="2.0", export_path=folder / "2.0", labels=str(labels))
    shutil.move(new, store / "vivit-2.0.mar")
    return store


@pytest.fixture(scope="session")
def server(store, tmp_path_factory):
    """The shipped settings with one worker; models can be registered."""
    with running_server(tmp_path_factory.mktemp("server"), store=store, enable_model_api="true") as server:
        yield server


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """Bytes of a short H.264 clip."""
    return write_clip(tmp_path_factory.mktemp("video") / "a.mp4", numbered_frames(30, seed=1)).read_bytes()


@pytest.fixture(scope="session")
def expected(server, video):
    """The shared server's answer to `video`, sent alone."""
    answer = server.rest(video)
    assert answer.status == 200, answer
    return answer
