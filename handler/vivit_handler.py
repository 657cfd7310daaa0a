"""TorchServe's entry file: the hooks that a worker runs for each batch of requests.

TorchServe calls `initialize` once per worker and `handle` once per batch. `handle` runs three hooks:

    rows           list of {name: bytes}, one row per request
      -> preprocess     list of Job: request parsed; video sampled, decoded and resized, all files in parallel
      -> inference      list of Job: logits, micro-batched over all requests; then explanations, one after the other
      -> postprocess    list of dict: the answer, or the error with its HTTP status

Each Job has its own error, because TorchServe answers the whole batch with 503 if an exception leaves this class.
Whatever concerns a single Job therefore runs inside `_isolated`.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import av
import torch
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

# The objects of these imports stay as long as the worker. Without them, a full collection takes 3 ms instead of 80 ms.
gc.freeze()

ARCHIVE = Path(__file__).parent
if (ARCHIVE / "handler" / "__init__.py").is_file():
    # The package in the archive takes precedence over any other `handler` that is installed.
    sys.path.insert(0, str(ARCHIVE))

from handler import __version__, torchserve_compat  # noqa: E402
from handler.classifier import VideoClassifier  # noqa: E402
from handler.clips import Clip  # noqa: E402
from handler.inference import DeviceError, is_out_of_memory  # noqa: E402
from handler.job import Job  # noqa: E402
from handler.models.config import VivitConfig  # noqa: E402
from handler.models.cost import count_multiply_adds, count_parameters  # noqa: E402
from handler.options import HandlerOptions  # noqa: E402
from handler.processing.image_processor import VivitImageProcessor  # noqa: E402
from handler.protocol import (  # noqa: E402
    ApiError,
    BadRequest,
    DecodersBusy,
    ExplanationsBusy,
    InternalError,
    NotSupported,
    OutOfMemory,
    RequestLimits,
    parse_request,
    render_error,
    status_of_video_error,
)
from handler.sandbox import DecoderPool, DecodersBusyError, DecoderSettings  # noqa: E402
from handler.threads import available_cores, worker_inference_threads  # noqa: E402
from handler.video import VideoError  # noqa: E402

logger = logging.getLogger(__name__)

THREADS_UPDATE_INTERVAL_S = 1


class VivitHandler(torchserve_compat.PerRequestHandler):
    """Classifies uploaded videos with the checkpoint in the archive."""

    _next_threads_update_s = 0.0

    def initialize(self, context: torchserve_compat.Context) -> None:
        """Loads the classifier on the device that TorchServe assigned, and warms it up.

        Raises:
            RuntimeError: the model cannot be served. TorchServe reports the message of no other exception.
        """
        self.context = context
        self.manifest = context.manifest
        try:
            with contextlib.ExitStack() as on_error:
                options = HandlerOptions.from_dict((context.model_yaml_config or {}).get("handler") or {})
                self.decoders = self._start_decoders(options)  # they start while the model is loaded
                on_error.callback(self.decoders.close)
                self.device = assigned_device(context.system_properties.get("gpu_id"))
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # code that names no device must not initialize another GPU
                self.classifier = VideoClassifier.from_pretrained(
                    context.system_properties["model_dir"], options=options, device=self.device
                )
                self.limits = RequestLimits(
                    max_upload_bytes=options.max_upload_bytes,
                    max_top_k=self.classifier.max_top_k,
                    default_top_k=options.top_k,
                    views=options.view_defaults,
                )
                self._update_threads()
                self.classifier.warm_up()
                self.confinement = self.decoders.confinement()
                on_error.pop_all()
        except Exception as error:
            raise RuntimeError(f"model {context.model_name} cannot be served: {error}") from error
        torchserve_compat.repair_rows()
        torchserve_compat.stop_server_after_lost_worker()
        self.initialized = True
        gc.freeze()
        active, missing = ", ".join(self.confinement.active) or "nothing", ", ".join(self.confinement.missing)
        if missing:
            logger.warning("decoder processes are confined by %s; this host lacks %s", active, missing)
        else:
            logger.info("decoder processes are confined by %s", active)
        logger.info("model %s is ready on %s in %s", context.model_name, self.device, self.classifier.dtype)

    def preprocess(self, rows: Sequence[MutableMapping[str, Any]]) -> list[Job]:
        """Parses each row, then samples, decodes and resizes all videos in parallel. Empties the rows."""
        jobs = [Job(index) for index in range(len(rows))]
        for job, row in zip(jobs, rows):
            with self._isolated(job):
                self._parse(job, row)
            row.clear()  # the row of a request that was rejected early still holds its upload
        parsed = [(job, job.request) for job in jobs if job.request is not None]
        clips = self.decoders.load_clips(
            [request.video for _, request in parsed], views=[request.views for _, request in parsed]
        )
        for (job, request), clip in zip(parsed, clips):
            job.request = request.without_video()
            with self._isolated(job):
                if isinstance(clip, Exception):
                    raise clip
                self._observe("vivit_decode_seconds", clip.decode_s, "s", job.index)
                self._observe("vivit_resize_seconds", clip.resize_s, "s", job.index)
                self._count("vivit_decoded_frames_total", clip.decoded_frames, job.index)
                job.clip = clip
        return jobs

    def inference(self, jobs: list[Job]) -> list[Job]:
        """Computes the logits or the explanation of all jobs that have a clip."""
        loaded = [(job, job.clip) for job in jobs if job.clip is not None]
        if not loaded:
            return jobs
        self._update_threads()
        try:
            others = [(job, clip) for job, clip in loaded if not is_explanation(job)]
            self._classify([(job, clip) for job, clip in others if not self._wants_mean(job)])
            self._classify([(job, clip) for job, clip in others if self._wants_mean(job)], with_mean=True)
            self._explain([(job, clip) for job, clip in loaded if is_explanation(job)])
        except DeviceError:
            logger.critical("the worker exits; TorchServe starts a new one", exc_info=True)
            logging.shutdown()
            os._exit(1)  # a normal exit would wait for the GPU
        return jobs

    def _classify(self, loaded: Sequence[tuple[Job, Clip]], *, with_mean: bool = False) -> None:
        """Computes the logits and features of jobs. `with_mean`: the features are the mean of the tokens."""
        if not loaded:
            return
        start_s = time.perf_counter()
        try:
            results = self.classifier.view_outputs_or_errors([clip.inputs for _, clip in loaded], with_mean=with_mean)
        except DeviceError:
            raise
        except Exception as error:
            results = [error] * len(loaded)
        self._observe("vivit_inference_seconds", time.perf_counter() - start_s, "s")
        self._observe("vivit_batch_clips", len(loaded), "Count")
        self._count("vivit_clips_total", len(loaded))
        for (job, _), result in zip(loaded, results):
            with self._isolated(job):
                if isinstance(result, Exception):
                    raise result
                job.logits, job.features = result

    def _wants_mean(self, job: Job) -> bool:
        """Whether a job needs the mean of the tokens of a model that classifies by CLS."""
        choice = job.request.embedding if job.request is not None else None
        return choice is not None and choice.pooling == "mean" and self.classifier.config.has_cls_token

    def _explain(self, loaded: Sequence[tuple[Job, Clip]]) -> None:
        """Explains jobs one after the other, as many as the time for a batch allows, but at least one."""
        start_s = time.perf_counter()
        for number, (job, clip) in enumerate(loaded):
            with self._isolated(job):
                assert job.request is not None
                if number and time.perf_counter() - start_s > self.classifier.options.max_batch_explain_s:
                    raise ExplanationsBusy()
                explanation_start_s = time.perf_counter()
                label = job.request.label
                indices = None if label is None else self.classifier.label_indices(label)
                job.explanation = self.classifier.explain_clip(clip, indices=indices)
                job.clip = job.explanation.clip
                job.logits = job.explanation.logits[None]  # (1, labels)
                self._observe("vivit_explanation_seconds", time.perf_counter() - explanation_start_s, "s", job.index)

    def postprocess(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Returns the body of each response and sets its HTTP status."""
        bodies = [self._render(job) for job in jobs]
        for job in jobs:
            if torchserve_compat.is_closed_stream(self.context, job.index):
                torchserve_compat.withhold_response(self.context, job.index)
        return bodies

    def describe_handle(self) -> dict[str, Any]:
        """Returns the description of the model that `GET /models/NAME?customized=true` shows."""
        config, options = self.classifier.config, self.classifier.options
        return {
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            **({} if config.label_heads is None else {"heads": config.labels_of_heads}),
            "clip": {
                "frames": config.num_frames,
                "height": config.image_height,
                "width": config.image_width,
                "sampling": options.sampling,
                "views": options.views,
            },
            "attention_type": config.attention_type,
            "parameters": count_parameters(config),
            "multiply_adds_per_clip": count_multiply_adds(config),
            "options": dataclasses.asdict(options),
            "sandbox": {"active": list(self.confinement.active), "missing": list(self.confinement.missing)},
            "weights_sha256": self.classifier.weights_sha256,
            "device": str(self.device),
            "attention": options.attn_implementation,
            "dtype": str(self.classifier.dtype).removeprefix("torch."),
            "dtype_reason": self.classifier.dtype_reason,
            "versions": {
                "vivit": __version__,  # of the code in the archive, not of the package that is installed
                "python": platform.python_version(),
                "torch": torch.__version__,
                "av": av.__version__,
            },
        }

    def _start_decoders(self, options: HandlerOptions) -> DecoderPool:
        properties = self.context.system_properties
        clip_settings = options.clip_settings(
            num_frames=VivitConfig.from_pretrained(properties["model_dir"]).num_frames,
            resize_crop=VivitImageProcessor.from_pretrained(properties["model_dir"]).resize_crop,
        )
        files_in_parallel = options.decode_processes or available_cores()
        return DecoderPool(
            DecoderSettings.from_options(options, clip=clip_settings),
            # A worker never has more files than one batch.
            processes=min(files_in_parallel, int(properties.get("batch_size") or 1)),
            threads=files_in_parallel,
        )

    @contextlib.contextmanager
    def _isolated(self, job: Job) -> Iterator[None]:
        """Makes an exception in the `with` block the error of this job, so that it does not affect the others.

        Raises:
            DeviceError: no job of this worker can succeed.
        """
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            job.error = self._to_api_error(job.index, error)
            release_frames(error)

    def _parse(self, job: Job, row: MutableMapping[str, Any]) -> None:
        headers = torchserve_compat.request_headers(self.context, job.index)
        if torchserve_compat.is_closed_stream(self.context, job.index):
            raise NotSupported("StreamPredictions2 is for models with sequences, and this model has none")
        is_explanation = headers.get("explain") == "True"
        if headers.get("describe") == "True" and not row and not is_explanation:
            job.description = self.describe_handle()
            return
        request = parse_request(row, headers=headers, limits=self.limits, is_explanation=is_explanation)
        if request.embedding is not None:
            try:
                self.classifier.check_pooling(request.embedding.pooling)
            except ValueError as error:
                raise BadRequest(str(error), code="bad_parameter") from error
        if request.label is not None:
            try:
                self.classifier.label_indices(request.label)
            except ValueError as error:
                raise BadRequest(str(error), code="bad_parameter") from error
        job.request = request

    def _render(self, job: Job) -> dict[str, Any]:
        self.context.set_response_content_type(job.index, "application/json")
        torchserve_compat.end_grpc_stream(self.context, job.index)
        with self._isolated(job):
            if job.error is None:
                return self._render_result(job)
        assert job.error is not None
        self._count("vivit_rejected_requests_total", 1, job.index, [Dimension("Code", job.error.code)])
        self.context.set_response_status(code=job.error.status, phrase=job.error.code, idx=job.index)
        return render_error(job.error)

    def _render_result(self, job: Job) -> dict[str, Any]:
        if job.description is not None:
            return job.description
        assert job.request is not None and job.clip is not None and job.logits is not None
        if job.request.embedding is not None:
            assert job.features is not None
            choice = job.request.embedding
            embedding = self.classifier.embedding(
                job.clip, job.features, pooling=choice.pooling, normalize=choice.normalize
            )
            return embedding.to_answer(encoding=choice.encoding)
        answer = self.classifier.rank(job.clip, job.logits, k=job.request.top_k).to_answer()
        if job.explanation is not None:
            answer["explanation"] = job.explanation.render()
        json.dumps(answer, allow_nan=False)  # TorchServe serializes all answers together, and all fail if one does
        return answer

    def _update_threads(self) -> None:
        """Sets torch's number of threads on a CPU. Repeated regularly, because scaling changes the worker's share."""
        # torch.compile compiles for a number of threads and would compile again for another one.
        if self.device.type != "cpu" or (self.classifier.options.compile and self.initialized):
            return
        if time.monotonic() < self._next_threads_update_s:
            return
        self._next_threads_update_s = time.monotonic() + THREADS_UPDATE_INTERVAL_S
        threads = worker_inference_threads(
            requested=self.classifier.options.inference_threads, useful=self.classifier.useful_threads
        )
        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    # Each metric must be declared in handler/assets/metrics.yaml with the same unit and dimensions.
    def _observe(self, name: str, value: float, unit: str, index: int | None = None) -> None:
        self.context.metrics.add_metric(name, value, unit, idx=index, dimensions=[], metric_type=MetricTypes.HISTOGRAM)

    def _count(self, name: str, value: int, index: int | None = None, dimensions: Sequence[Dimension] = ()) -> None:
        self.context.metrics.add_metric(
            name, value, "Count", idx=index, dimensions=list(dimensions), metric_type=MetricTypes.COUNTER
        )

    def _to_api_error(self, index: int, error: Exception) -> ApiError:
        """Converts any exception to the error that its request is answered with."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, VideoError):
            return ApiError(str(error), status=status_of_video_error(error.code), code=error.code)
        if isinstance(error, DecodersBusyError):
            return DecodersBusy()
        request_id = self.context.get_request_id(index)
        # Only the log gets the traceback, which may contain paths and file contents.
        logger.error("request %s failed", request_id, exc_info=error)
        return OutOfMemory(str(request_id)) if is_out_of_memory(error) else InternalError(str(request_id))


def is_explanation(job: Job) -> bool:
    """Whether the request of a job asks for an explanation."""
    return job.request is not None and job.request.is_explanation


def release_frames(error: BaseException | None) -> None:
    """Removes the tracebacks of an exception and of those that led to it.

    Stack frames, and attributes such as UnicodeDecodeError.object, refer to the request, which would otherwise stay in
    memory as long as the batch.
    """
    if error is not None:
        earlier = (error.__cause__, error.__context__)
        error.__traceback__ = error.__cause__ = error.__context__ = None
        for each in earlier:
            release_frames(each)


def assigned_device(gpu_id: int | str | None) -> torch.device:
    """Returns the device for the `gpu_id` that TorchServe assigned to this worker; None means the CPU.

    Raises:
        RuntimeError: torch finds GPUs, but not this one.
    """
    if gpu_id is None:
        return torch.device("cpu")
    if torch.cuda.is_available():
        if int(gpu_id) >= (count := torch.cuda.device_count()):
            raise RuntimeError(
                f"TorchServe assigned GPU {gpu_id}, but torch finds {count} (numbered from 0): check "
                "CUDA_VISIBLE_DEVICES, and number_of_gpu in config.properties"
            )
        return torch.device("cuda", int(gpu_id))
    logger.warning("TorchServe assigned GPU %s, but torch %s cannot use it", gpu_id, torch.__version__)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
