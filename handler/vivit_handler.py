"""TorchServe's side of the door: the only file that knows TorchServe.

TorchServe calls `initialize` once per worker and `handle` once per batch; BaseHandler.handle runs the three hooks:

    rows                    list of {name: bytes}, a row per request
      -> preprocess         list of (Request, Clip) | ApiError            parse; sample, decode and resize side by side
      -> inference          list of (Request, Clip, logits) | ApiError    micro-batched over all requests
      -> postprocess        list of dict                                  the answer, or the error and its HTTP status

Every request is a value or an error of its own from start to end: an exception that leaves this class fails the
whole batch with 503. A request to describe the model is a dict, its answer, from the start.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import logging
import mmap
import os
import platform
import signal
import sys
import time
from pathlib import Path

import av
import psutil
import torch
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

ARCHIVE = Path(__file__).parent
if (ARCHIVE / "handler" / "__init__.py").is_file():
    # Inside an archive its own package must win over any other `handler` that the machine has.
    sys.path.insert(0, str(ARCHIVE))

from handler.classifier import DeviceError, VideoClassifier, is_out_of_memory  # noqa: E402
from handler.options import HandlerOptions  # noqa: E402
from handler.protocol import api  # noqa: E402
from handler.sandbox import DecoderPool, DecoderSettings  # noqa: E402
from handler.threads import available_cores  # noqa: E402
from handler.video import VideoError  # noqa: E402

logger = logging.getLogger(__name__)


class VivitHandler(BaseHandler):
    """Classifies uploaded videos with the checkpoint that lies beside it in the archive."""

    _next_look_s = 0.0

    def initialize(self, context):
        """Loads the classifier on the device that TorchServe assigned, and warms it up.

        Raises:
            RuntimeError: with the cause; TorchServe reports no other exception well.
        """
        self.context = context
        self.manifest = context.manifest
        try:
            options = HandlerOptions.from_dict((context.model_yaml_config or {}).get("handler") or {})
            self.device = _assigned_device(context.system_properties.get("gpu_id"))
            self.classifier = VideoClassifier.from_pretrained(
                context.system_properties["model_dir"], options=options, device=self.device
            )
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # what asks for no device in particular shall not open another
            at_once = options.decode_processes or available_cores()
            self.decoders = DecoderPool(
                DecoderSettings(
                    clip=self.classifier.clip_settings,
                    max_decode_s=options.max_decode_s,
                    max_memory_bytes=options.max_decode_memory_bytes,
                ),
                # Never has a worker more files than a batch at a time.
                processes=min(at_once, int(context.system_properties.get("batch_size") or 1)),
                threads=at_once,
            )
            self._share_cores()
            self.classifier.warm_up()
            if Path(sys.argv[0]).name == "model_service_worker.py":  # TorchServe's, and no test's process
                atexit.register(end_a_server_without_workers)
        except Exception as error:
            raise RuntimeError(f"model {context.model_name} cannot be served: {error}") from error
        self.initialized = True
        logger.info("model %s is ready on %s in %s", context.model_name, self.device, self.classifier.dtype)

    def preprocess(self, rows):
        """Rows of a batch -> list of (Request, Clip) | ApiError | dict."""
        prepared = [self._parse(index, row) for index, row in enumerate(rows)]
        good = [index for index, item in enumerate(prepared) if isinstance(item, api.Request)]
        clips = self.decoders.load_clips([prepared[index].video for index in good])
        for index, clip in zip(good, clips):
            if isinstance(clip, Exception):
                prepared[index] = self._refuse(index, clip)
                continue
            prepared[index] = (prepared[index], clip)
            self._observe("vivit_decode_seconds", clip.decode_s, "s", index)
            self._observe("vivit_resize_seconds", clip.resize_s, "s", index)
            self._count("vivit_decoded_frames_total", clip.decoded_frames, index)
        return prepared

    def inference(self, prepared):
        """List of (Request, Clip) | ApiError | dict -> list of (Request, Clip, logits (labels,)) | ApiError | dict."""
        good = [index for index, item in enumerate(prepared) if isinstance(item, tuple)]
        self._share_cores()
        started_s = time.perf_counter()
        try:
            logits = self.classifier.logits_or_errors([prepared[index][1].pixels for index in good])
        except DeviceError:
            logger.critical("the worker ends, and TorchServe starts a new one", exc_info=True)
            logging.shutdown()
            os._exit(1)  # at once: an orderly end would wait for the GPU
        if good:
            self._observe("vivit_inference_seconds", time.perf_counter() - started_s, "s")
            self._observe("vivit_batch_clips", len(good), "Count")
            self._count("vivit_clips_total", len(good))
        for index, row in zip(good, logits):
            failed = isinstance(row, Exception)
            prepared[index] = self._refuse(index, row) if failed else (*prepared[index], row)
        return prepared

    def postprocess(self, results):
        """List of (Request, Clip, logits) | ApiError | dict -> list of dict; sets each one's HTTP status."""
        answers = [self._render(index, result) for index, result in enumerate(results)]
        for index in range(len(answers)):
            if self._has_closed_stream(index):
                del self.context.request_ids[index]  # what has no id is not sent
        return answers

    def describe_handle(self):
        """The model's card, which `GET /models/NAME?customized=true` shows."""
        config, options = self.classifier.config, self.classifier.options
        return {
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "clip": {
                "frames": config.num_frames,
                "height": config.image_height,
                "width": config.image_width,
                "sampling": options.sampling,
            },
            "options": dataclasses.asdict(options),  # the limits among them
            "weights_sha256": self._weights_sha256,
            "device": str(self.device),
            "attention": options.attn_implementation,
            "dtype": str(self.classifier.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        }

    @functools.cached_property
    def _weights_sha256(self):
        with open(Path(self.context.system_properties["model_dir"]) / "model.safetensors", "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as weights:
                return hashlib.sha256(weights).hexdigest()

    # BaseHandler would ask the first request's headers, which anybody can send, what the whole batch is about; _parse
    # asks each request.
    def _is_describe(self):
        return False

    def _is_explain(self):
        return False

    def _parse(self, index, row):
        headers = self._headers(index)
        try:
            if self._has_closed_stream(index):
                raise api.ApiError("this model keeps no state for StreamPredictions2", status=501, code="not_supported")
            if headers.get("describe") == "True" and not row:
                return self.describe_handle()
            if headers.get("explain") == "True":
                raise api.ApiError("this model offers no explanations", status=501, code="not_supported")
            classifier = self.classifier
            return api.parse_request(
                row,
                headers=headers,
                default_top_k=classifier.options.top_k,
                num_labels=classifier.config.num_labels,
                max_upload_bytes=classifier.options.max_upload_bytes,
            )
        except Exception as error:
            return self._refuse(index, error)

    def _render(self, index, result):
        self.context.set_response_content_type(index, "application/json")
        if self._came_over_grpc(index):
            # To StreamPredictions this ends the stream; without it TorchServe 0.12 fails there and ends the worker.
            self.context.set_response_header(index, "ts_stream_next", "false")
        if isinstance(result, dict):
            return result
        if isinstance(result, api.ApiError):
            self._count("vivit_rejected_requests_total", 1, index, [Dimension("Code", result.code)])
            self.context.set_response_status(code=result.status, phrase=result.code, idx=index)
            return api.render_error(result)
        request, clip, logits = result
        return api.render_answer(
            self.classifier.top_k(logits, k=request.top_k),
            video=dataclasses.asdict(clip.info),
            times_s=clip.times_s,
            warnings=clip.warnings,
        )

    def _came_over_grpc(self, index):
        return not self._headers(index)

    def _has_closed_stream(self, index):
        """Whether a request is one of gRPC's StreamPredictions2.

        TorchServe 0.12 closes such a call at once, since this model knows no sequences, and passes the request on all
        the same. If it got an answer, it would fail to send that, end the worker and start no other.
        """
        headers = self._headers(index)
        return bool(headers) and all(name.startswith("ts_request_sequence_") for name in headers)

    def _headers(self, index):
        """A request's own headers, without those of its parts, which are dicts; over gRPC there are none."""
        headers = self.context.get_all_request_header(index)
        return {name: value for name, value in headers.items() if not isinstance(value, dict)}

    def _share_cores(self):
        """Lets torch use this worker's share of the cores, as far as the model is worth it.

        On a CPU; the share is looked up once a second, since scaling changes it.
        """
        # Compiled code is made for a number of threads: it would be compiled again with each other.
        if self.device.type != "cpu" or (self.classifier.options.compile and self.initialized):
            return
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + 1
        threads = self.classifier.options.inference_threads
        if not threads and "OMP_NUM_THREADS" in os.environ:  # the operator's word
            return
        threads = threads or max(1, min(self.classifier.useful_threads, available_cores() // _count_workers()))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    # Each metric stands in scripts/metrics.yaml as well, with the same unit and dimensions.
    def _observe(self, name, value, unit, index=None):
        self.context.metrics.add_metric(name, value, unit, idx=index, dimensions=[], metric_type=MetricTypes.HISTOGRAM)

    def _count(self, name, value, index=None, dimensions=()):
        self.context.metrics.add_metric(
            name, value, "Count", idx=index, dimensions=list(dimensions), metric_type=MetricTypes.COUNTER
        )

    def _refuse(self, index, error):
        """Any exception -> the ApiError that its request is answered with."""
        if isinstance(error, api.ApiError):
            return error
        if isinstance(error, VideoError):
            return api.ApiError(str(error), status=api.status_of(error.code), code=error.code)
        request_id = self.context.get_request_id(index)
        # The traceback stays in the log: it may tell paths and contents.
        logger.error("request %s failed", request_id, exc_info=error)
        return api.OutOfMemory(request_id) if is_out_of_memory(error) else api.InternalError(request_id)


def _count_workers():
    """Workers of this server, this one included: processes of one parent, the front end, that run one script."""
    count = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with contextlib.suppress(psutil.Error):  # it has ended in the meantime
                count += sys.argv[0] in process.cmdline()
    return max(1, count)


def end_a_server_without_workers(*, patience_s=20):
    """When a worker ends: ends its server, too, if that has no worker left and is not about to start one.

    TorchServe 0.12 can lose a worker without noticing: where a gRPC client cancels a call in the moment in which it is
    answered, the thread that looks after the worker stops. The server goes on to say that it is healthy and takes
    requests, which nobody answers. Ended, it can be started again by whoever looks after it. In every other case
    TorchServe kills the worker that it has let go, so that this function does not come to its end.
    """
    server = os.getppid()
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        if os.getppid() != server:  # it has ended
            return
        time.sleep(0.1)
    logger.critical("TorchServe has lost a worker without noticing (see README, Security)")
    if _count_workers() == 1:  # this one
        logger.critical("no worker is left: the server ends, to be started again")
        os.kill(server, signal.SIGTERM)


def _assigned_device(gpu_id):
    """TorchServe spreads a model's workers over the GPUs and tells each worker its own by `gpu_id`."""
    if gpu_id is None:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(gpu_id))
    logger.warning("TorchServe assigned GPU %s, but torch %s cannot use it", gpu_id, torch.__version__)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
