"""TorchServe with a worker on the GPU: its device, its answers over REST and gRPC, and a worker that loses its GPU."""

import json
import zipfile
from functools import partial

import pytest
import torch

pytest.importorskip("ts", reason="torchserve is not installed")
pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")

from handler import VideoClassifier
from handler.cli.command import CommandError
from handler.cli.java import find_java_home
from handler.vivit_handler import VivitHandler, assigned_device
from tests.server.conftest import server, store, video  # noqa: F401
from tests.support.clips import varied_clips
from tests.support.server import concurrently, running_server, wait_for
from tests.unit.test_vivit_handler import make_context

try:
    find_java_home()
except CommandError as error:
    pytest.skip(str(error), allow_module_level=True)

BREAKING_TOP_K = 7
# TorchServe loads the only class of the archive's entry file.
BREAKING_HANDLER = f"""
import torch

from handler.inference import DeviceError
from vivit_handler import VivitHandler


class BreakingHandler(VivitHandler):
    def inference(self, jobs):
        if any(job.request and job.request.top_k == {BREAKING_TOP_K} for job in jobs):
            if self.device.type == "cuda":
                # fails in the kernel, after this line
                torch.zeros(1, device=self.device)[torch.tensor([9], device=self.device)]
            else:
                self.classifier.view_outputs_or_errors = fail
        return super().inference(jobs)


def fail(clips, **options):
    raise DeviceError("as if the device was broken")
"""


@pytest.mark.needs_cuda
def test_worker_uses_assigned_gpu(checkpoint):
    assert assigned_device("0") == assigned_device(0) == torch.device("cuda", 0)
    handler = VivitHandler()
    handler.initialize(make_context(checkpoint, gpu_id=0))
    try:
        parameters = {parameter.device for parameter in handler.classifier.model.parameters()}
        assert parameters == {torch.device("cuda", 0)}
        assert torch.cuda.current_device() == 0
    finally:
        handler.decoders.close()


@pytest.mark.needs_cuda
def test_missing_gpu_reported(checkpoint):
    count = torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=f"cannot be served: TorchServe assigned GPU {count}, but torch finds"):
        VivitHandler().initialize(make_context(checkpoint, gpu_id=count))


def test_served_batch_equals_classifier(server, checkpoint, device, tmp_path):  # noqa: F811
    description = server.describe(customized="true")["customizedMetadata"]
    assert description["device"] == ("cuda:0" if device.type == "cuda" else "cpu")
    classifier = VideoClassifier.from_pretrained(checkpoint, device=device)
    assert description["dtype"] == str(classifier.dtype).removeprefix("torch.")
    paths = varied_clips(tmp_path)
    requests = [partial(send, path, parameters={"top_k": "9"}) for send in (server.rest, server.grpc) for path in paths]
    for path, answer in zip(paths * 2, concurrently(*requests)):
        found = {each["label"]: each["score"] for each in answer.body["predictions"]}
        expected = dict(classifier.classify(path, top_k=9).predictions)
        # Batches of other sizes may round differently.
        assert found == pytest.approx(expected, abs=1e-2 if device.type == "cuda" else 1e-5)


def test_worker_that_loses_its_gpu_is_replaced(store, video, tmp_path):  # noqa: F811
    breaking = tmp_path / "store"
    breaking.mkdir()
    make_breaking_archive(store / "vivit.mar", breaking / "vivit.mar")
    with running_server(tmp_path / "server", store=breaking) as server:  # noqa: F811
        expected = server.rest(video)
        assert expected.status == 200, expected
        before = server.ready_pids()
        lost = server.rest(video, parameters={"top_k": str(BREAKING_TOP_K)})
        assert lost.error["message"].endswith("Worker died."), lost
        wait_for(lambda: server.ready_pids() and server.ready_pids().isdisjoint(before), timeout_s=120)
        assert server.rest(video).body["predictions"] == expected.body["predictions"]
        assert "no longer works" in server.log_file.read_text() or "as if" in server.log_file.read_text()


def make_breaking_archive(archive, target):
    """Copies an archive, with BREAKING_HANDLER as its entry file."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content)
                manifest["model"]["handler"] = "breaking_handler.py"
                content = json.dumps(manifest).encode()
            new.writestr(name, content)
        new.writestr("breaking_handler.py", BREAKING_HANDLER)
