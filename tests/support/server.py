"""A real TorchServe for the end-to-end tests: its settings, requests to it, and its processes.

    with running_server(folder, store=store, job_queue_size="8") as server:
        answer = server.rest(video)
        assert server.describe()["batchSize"] == 8

Tests suspend processes (SIGSTOP) to keep requests in flight, so that no result depends on timing.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import requests

from handler.cli.client import (
    Answer,
    authorization_metadata,
    classify_grpc,
    classify_rest,
    load_proto,
    open_channel,
    read_answer,
)
from handler.cli.properties import on_free_ports, read_properties, with_model_settings
from handler.cli.server import Server, ServerError
from stress.server import is_same_answer

Stub = tuple[Any, Any, list[tuple[str, str]]]

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE = 8  # as in config.properties
ANSWER_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0  # for processes to exit and connections to close


class ServerUnderTest(Server):
    """A Server with the requests that tests send. Token authorization is handled by every method."""

    def rest(self, video: bytes | str | Path, **options: Any) -> Answer:
        """Classifies a video over REST; see handler.cli.client.classify_rest."""
        options = {"token": self.token("inference"), "timeout_s": ANSWER_TIMEOUT_S, **options}
        return classify_rest(video, url=self.inference_url, **options)

    def grpc(self, video: bytes | str | Path, **options: Any) -> Answer:
        """Classifies a video over gRPC; see handler.cli.client.classify_grpc."""
        options = {"token": self.token("inference"), "timeout_s": ANSWER_TIMEOUT_S, **options}
        return classify_grpc(video, address=self.grpc_inference, **options)

    def grpc_stream(self, video: bytes, **parameters: str) -> Answer:
        """Classifies a video with StreamPredictions, which must stream exactly one response."""
        with self.inference_stub() as (stub, messages, metadata):
            request = messages.PredictionsRequest(
                model_name="vivit",
                input={"data": video, **{name: value.encode() for name, value in parameters.items()}},
            )
            (response,) = stub.StreamPredictions(request, metadata=metadata, timeout=ANSWER_TIMEOUT_S)
        return read_answer(response.prediction)

    def inference_stub(self) -> contextlib.AbstractContextManager[Stub]:
        """A context with (stub, messages, metadata) of the gRPC inference API."""
        return self._stub("inference", service="InferenceAPIsService", address=self.grpc_inference)

    def management_stub(self) -> contextlib.AbstractContextManager[Stub]:
        """A context with (stub, messages, metadata) of the gRPC management API."""
        return self._stub("management", service="ManagementAPIsService", address=self.grpc_management)

    @contextlib.contextmanager
    def _stub(self, api: str, *, service: str, address: str) -> Iterator[Stub]:
        messages, services = load_proto(f"{api}.proto")
        with open_channel(address) as channel:
            stub = getattr(services, f"{service}Stub")(channel)
            yield stub, messages, authorization_metadata(self.token(api))

    def manage(self, method: str, path: str, **parameters: str | int) -> requests.Response:
        """Calls the REST management API."""
        return requests.request(
            method,
            f"{self.management_url}{path}",
            params=parameters,
            headers=self.headers("management"),
            timeout=ANSWER_TIMEOUT_S,
        )

    def register(self, archive: str, **settings: str | int) -> None:
        """Registers an archive of the model store, by default with one worker."""
        settings = {"initial_workers": 1, "batch_size": BATCH_SIZE, "synchronous": "true", **settings}
        response = self.manage("POST", "/models", url=archive, **settings)
        assert response.ok, response.text

    def scale(self, workers: int) -> None:
        """Sets the number of workers of the default version."""
        for _ in range(3):
            response = self.manage("PUT", "/models/vivit", min_worker=workers, max_worker=workers, synchronous="true")
            # TorchServe 0.12 may fail to scale busy workers with this exception; a second call succeeds.
            if "ConcurrentModificationException" not in response.text:
                break
        assert response.ok, response.text

    def describe(self, version: str = "", **parameters: str) -> dict[str, Any]:
        """Description of one version of the model, by default of the default version."""
        return self.manage("GET", f"/models/vivit/{version}".rstrip("/"), **parameters).json()[0]

    def ready_pids(self, version: str = "") -> set[int]:
        """Process ids of the workers that are ready."""
        return {worker["pid"] for worker in self.describe(version)["workers"] if worker["status"] == "READY"}

    def pending_requests(self) -> int:
        """Number of requests that no worker has taken yet."""
        return self.describe()["jobQueueStatus"]["pendingRequests"]

    def metric(self, name: str) -> float:
        """Value of a Prometheus metric of the model, 0 if it has not been reported yet."""
        response = requests.get(f"{self.metrics_url}/metrics", timeout=ANSWER_TIMEOUT_S)
        found = re.search(rf'^{name}{{[^}}]*ModelName="vivit"[^}}]*}} (\S+)$', response.text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def processes(self) -> list[psutil.Process]:
        """The Java process, the workers and their decoders."""
        return [self.process, *self.process.children(recursive=True)]

    def stop(self) -> None:
        # A graceful stop takes seconds; the tests of stopping do not use this method.
        with contextlib.suppress(psutil.Error, IndexError, ServerError):
            for process in self.processes():
                process.kill()
        super().stop()


def settings(**changes: str) -> dict[str, str]:
    """config.properties as shipped, on free ports and with one worker, with `changes`."""
    shipped = with_model_settings(read_properties(ROOT / "config.properties"), minWorkers=1)
    return {**on_free_ports(shipped), **changes}


@contextlib.contextmanager
def running_server(folder: Path, *, store: Path, **changes: str) -> Iterator[ServerUnderTest]:
    """Runs a server in `folder` with the shipped settings and `changes`; yields it when its worker is ready."""
    with ServerUnderTest(config=settings(**changes), model_store=store, directory=folder) as server:
        server.wait_until_ready("vivit")
        yield server


def wait_for(condition: Callable[[], bool], *, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"still waiting after {timeout_s:.0f} s"
        time.sleep(0.02)


@contextlib.contextmanager
def suspended(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Suspends processes while the block runs."""
    processes = list(processes)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextlib.contextmanager
def in_flight(
    *asks: Callable[[], Answer], count: int, suspend: Iterable[psutil.Process]
) -> Iterator[list[Future[Answer]]]:
    """Suspends processes and sends `count` requests, alternating between the functions; yields the requests' futures.

    Afterwards resumes the processes and waits for the requests.
    """
    with ThreadPoolExecutor(count) as pool, suspended(suspend):
        yield [pool.submit(ask) for ask in itertools.islice(itertools.cycle(asks), count)]


def results(futures: Iterable[Future[Answer]]) -> list[Answer]:
    return [future.result(timeout=ANSWER_TIMEOUT_S) for future in futures]


def concurrently(*asks: Callable[[], Answer], clients: int = 16) -> list[Answer]:
    """Calls the functions in parallel; returns their results in order."""
    with ThreadPoolExecutor(clients) as pool:
        return results([pool.submit(ask) for ask in asks])


@contextlib.contextmanager
def load(server: ServerUnderTest, video: bytes, *, clients: int = 4) -> Iterator[list[Answer]]:
    """Clients send one request after another while the block runs; yields the growing list of answers."""
    answers: list[Answer] = []
    is_over = threading.Event()

    def client() -> None:
        while not is_over.is_set():
            answers.append(server.rest(video))

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
        try:
            wait_for(lambda: len(answers) >= clients)
            yield answers
        finally:
            is_over.set()
        for future in futures:
            future.result(timeout=ANSWER_TIMEOUT_S)


def next_answers(answers: list[Answer], *, count: int = 8) -> list[Answer]:
    """Waits for `count` more answers under load; skips those of requests that are already in flight."""
    start = len(answers) + 8
    wait_for(lambda: len(answers) >= start + count)
    return answers[start : start + count]


def others(answers: Iterable[Answer], expected: Answer) -> list[Answer]:
    """The answers that differ from the expected one."""
    return [answer for answer in answers if not is_same_answer(answer, expected)]


def label_prefixes(answers: Iterable[Answer]) -> set[str]:
    """First parts of the best labels, e.g. {"LABEL"}; every answer must have predictions."""
    answers = list(answers)
    assert all("predictions" in answer.body for answer in answers), answers
    return {answer.body["predictions"][0]["label"].split("_")[0] for answer in answers}
