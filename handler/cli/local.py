"""Classifies videos without a server. `vivit classify --checkpoint` uses it.

Importing torch takes longer than everything else. Meanwhile the decoder processes start and decode the first videos:

    configuration, image processor    read without torch
      -> decoder processes            start, then decode
      -> torch, weights               at the same time, in a thread of this process
      -> answers                      as those of a server
"""

import gc
import tempfile
import threading
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from handler.assets import DEMO_CHECKPOINT
from handler.checkpoints.hub import CheckpointError
from handler.cli.client import Answer, failure
from handler.cli.command import CommandError
from handler.models.config import VivitConfig
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.protocol import ApiError, render_error, status_of_video_error
from handler.sandbox import DecoderPool, DecoderSettings
from handler.threads import available_cores
from handler.video import VideoError

if TYPE_CHECKING:
    from handler.classifier import VideoClassifier

DEMO = "demo"
ARCHIVE_SUFFIX = ".mar"
OPTIONS_FILE = "model-config.yaml"
OK_STATUS = 200


class LocalClassifier:
    """A classifier in this process and decoder processes; also a context manager. Returns while it still loads.

    Args:
        model: a checkpoint (directory or hub id), an archive (.mar), whose options apply, or `demo`.
        videos: number of videos that will be classified at the same time, at most.
        top_k: predictions per video. None: the options' `top_k`.
        explain: whether to explain the answers.
        label: what to explain. None: the best prediction.
        views: arguments of `ViewDefaults.resolve`; those that are missing have the options' values.

    Raises:
        CommandError: the checkpoint or archive cannot be used, as far as its configuration tells.
    """

    def __init__(
        self,
        model: str,
        *,
        videos: int,
        top_k: int | None = None,
        explain: bool = False,
        label: str | None = None,
        views: Mapping[str, Any] = {},
    ):
        self._model, self._explain, self._label = model, explain, label
        self._extracted = tempfile.TemporaryDirectory(prefix="vivit-")
        self._checkpoint: str | Path = DEMO_CHECKPOINT if model == DEMO else model
        try:
            if model.endswith(ARCHIVE_SUFFIX):
                self._checkpoint = Path(self._extracted.name)
                with zipfile.ZipFile(model) as archive:
                    archive.extractall(self._checkpoint)
            self._options = _read_options(self._checkpoint)
            self._top_k = top_k or self._options.top_k
            one_view = {"views": "1x1"} if explain else {}
            self._views = self._options.view_defaults.resolve(**{**views, **one_view})
            processes = min(videos, available_cores())
            self._decoders = DecoderPool(
                DecoderSettings.from_options(
                    self._options,
                    clip=self._options.clip_settings(
                        num_frames=VivitConfig.from_pretrained(self._checkpoint).num_frames,
                        resize_crop=VivitImageProcessor.from_pretrained(self._checkpoint).resize_crop,
                    ),
                ),
                processes=processes,
                threads=available_cores() // processes,
            )
        except (CheckpointError, ValueError, OSError, zipfile.BadZipFile) as error:
            self._extracted.cleanup()
            raise self._unusable(error) from error
        self._classifier: Future[VideoClassifier] = Future()
        self._lock = threading.Lock()
        self._loader = threading.Thread(target=self._load)
        self._loader.start()

    def classify(self, video: bytes | str) -> Answer:
        """Classifies one video. Thread-safe.

        Args:
            video: bytes of a file, or its path.

        Raises:
            CommandError: the checkpoint or archive cannot be used.
        """
        try:
            content = video if isinstance(video, bytes) else Path(video).read_bytes()
        except OSError as error:
            return failure("no_file", f"{error.strerror}: {video!s}")
        (clip,) = self._decoders.load_clips([content], views=[self._views])
        classifier = self._classifier.result()
        if isinstance(clip, VideoError):
            status = status_of_video_error(clip.code)
            body = render_error(ApiError(str(clip), status=status, code=clip.code))
            return Answer(body, status=status, is_from_handler=True)
        if isinstance(clip, Exception):
            return failure("internal_error", str(clip))
        explanation = None
        with self._lock:
            if self._explain:
                try:
                    indices = None if self._label is None else classifier.label_indices(self._label)
                except ValueError as error:
                    return failure("bad_parameter", str(error))
                explanation = classifier.explain_clip(clip, indices=indices)
            else:
                (logits,) = classifier.view_logits_or_errors([clip.inputs])  # (V, labels)
        if explanation is not None:
            clip, logits = explanation.clip, explanation.logits[None]  # (1, labels)
        elif isinstance(logits, Exception):
            return failure("internal_error", str(logits))
        answer = classifier.rank(clip, logits, k=self._top_k).to_answer()
        if explanation is not None:
            answer["explanation"] = explanation.render()
        return Answer(answer, status=OK_STATUS, is_from_handler=True)

    def close(self) -> None:
        """Waits for what runs, because torch must not run while Python exits, and stops the decoder processes."""
        self._loader.join()
        self._decoders.close()
        with self._lock:
            self._extracted.cleanup()

    def __enter__(self) -> "LocalClassifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        try:
            self._classifier.set_result(self._load_classifier())
        except (CheckpointError, ValueError, OSError, RuntimeError) as error:
            self._classifier.set_exception(self._unusable(error))
        except BaseException as error:
            self._classifier.set_exception(error)

    def _load_classifier(self) -> "VideoClassifier":
        gc.disable()  # a fifth of the time to import torch is spent looking for garbage among objects that stay
        try:
            import torch

            from handler.classifier import VideoClassifier
        finally:
            gc.freeze()
            gc.enable()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        classifier = VideoClassifier.from_pretrained(self._checkpoint, options=self._options, device=device)
        torch.set_num_threads(
            self._options.inference_threads or min(torch.get_num_threads(), classifier.useful_threads)
        )
        return classifier

    def _unusable(self, error: Exception) -> CommandError:
        return CommandError(f"{self._model} cannot be used: {error}")


def _read_options(checkpoint: str | Path) -> HandlerOptions:
    """The options in an archive; the defaults for a checkpoint, which has none."""
    path = Path(checkpoint, OPTIONS_FILE)
    settings: dict[str, Any] = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    return HandlerOptions.from_dict(settings.get("handler") or {})
