"""A TorchServe for stress tests, requests to it, and checks of its answers."""

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from handler.assets import DEMO_CHECKPOINT, SERVER_CONFIG
from handler.cli.build import build_archive
from handler.cli.client import Answer, classify_grpc, classify_rest
from handler.cli.properties import on_free_ports, read_properties
from handler.cli.server import Server
from handler.clips import ClipSettings
from handler.options import HandlerOptions
from handler.processing.resize import ResizeCrop
from handler.sandbox import DecoderSettings

MODEL = "vivit"
TIMEOUT_S = 120
MAX_SCORE_DIFFERENCE = 1e-4  # batches of different sizes round differently

# Of the decoder processes of `demo_server`, except for the size of clips.
DECODER_SETTINGS = DecoderSettings.from_options(
    HandlerOptions(), clip=ClipSettings(num_frames=1, resize_crop=ResizeCrop(resize_to=None, resample=2, crop_to=None))
)

REJECTED_STATUSES = (400, 413, 415, 422)
# Errors that mean a fault of the decoder or the server. Not `decode_memory`: there the limit has worked.
FAULT_CODES = ("decoder_crash", "decode_timeout", "internal_error", "out_of_memory")
# Parts of messages that reveal internals to a client.
INTERNAL_DETAILS = (str(Path(__file__).resolve().parents[2]), "/tmp", "Errno", "Traceback")
ADDRESS = re.compile(r"\b0x[0-9a-f]{6}", re.IGNORECASE)


class Outcome(NamedTuple):
    """The outcome of one input: a short description, and whether it reveals a defect."""

    text: str
    is_defect: bool


Ask = Callable[[bytes], Answer]


@contextlib.contextmanager
def demo_server(properties: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Starts a server with the demo model and the shipped settings on free ports.

    Args:
        properties: Settings that replace shipped ones.
    """
    with tempfile.TemporaryDirectory(prefix="vivit-server-") as folder:
        store = Path(folder) / "store"
        build_archive(checkpoint=str(DEMO_CHECKPOINT), name=MODEL, version="1.0", export_path=store)
        config = {**on_free_ports(read_properties(SERVER_CONFIG)), **(properties or {})}
        with Server(config=config, model_store=store, directory=Path(folder) / "run") as server:
            server.wait_until_ready(MODEL)
            yield server


def clients(server: Server) -> dict[str, Ask]:
    """Returns a function for each way to send a video: raw bytes over REST, gRPC, and base64 in JSON."""
    options: dict[str, Any] = {"model": MODEL, "token": server.token("inference"), "timeout_s": TIMEOUT_S}
    rest = functools.partial(classify_rest, url=server.inference_url, **options)
    return {
        "REST": rest,
        "gRPC": functools.partial(classify_grpc, address=server.grpc_inference, **options),
        "JSON": functools.partial(rest, send_as="json"),
    }


def judge_answer(answer: Answer) -> Outcome:
    """Checks that an answer is a prediction or a proper rejection."""
    status = answer.status or "gRPC"
    if answer.error is None:
        text = "answered with a warning" if answer.body["warnings"] else "answered"
        return Outcome(text, is_defect=answer.status not in (None, 200))
    code, message = answer.error["code"], answer.error["message"]
    if not answer.is_from_handler:
        return Outcome(f"no answer: {code}: {message[:200]}", is_defect=True)
    is_rejection = answer.status in (None, *REJECTED_STATUSES) and code not in FAULT_CODES
    return Outcome(f"{status} {code}", is_defect=not is_rejection or reveals_internals(message))


def reveals_internals(message: str) -> bool:
    """Whether an error message contains paths, addresses or other details of the implementation."""
    return any(detail in message for detail in INTERNAL_DETAILS) or bool(ADDRESS.search(message))


def is_same_answer(answer: Answer, expected: Answer) -> bool:
    """Whether two answers agree, in scores up to MAX_SCORE_DIFFERENCE."""
    if answer.error is not None or expected.error is not None:
        return answer.body == expected.body
    scores, expected_scores = (
        {prediction["label"]: prediction["score"] for prediction in each.body["predictions"]}
        for each in (answer, expected)
    )
    return (
        answer.body["video"] == expected.body["video"]
        and answer.body["warnings"] == expected.body["warnings"]
        and scores.keys() == expected_scores.keys()
        and all(abs(score - expected_scores[label]) < MAX_SCORE_DIFFERENCE for label, score in scores.items())
    )
