"""Which frames of a video, and which parts of them, become the model's inputs. Standard library only.

    defaults = ViewDefaults(sampling="dense")
    views = defaults.resolve(views="4x3", stride_frames=2)  # the paper's protocol

A view is one input of the model: T frames, cropped at one place. The views of a video are all pairs of a clip in time
and a crop along the longer side.
"""

import dataclasses
import re

from handler.validation import ConfigError, broken_rule, check_choice, check_integer, check_number

SAMPLINGS = ("uniform", "segment", "keyframes", "dense")

_GRID = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", re.ASCII)


class TooManyViewsError(ConfigError):
    """More views than the deployment allows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The views of one video.

    Attributes:
        clips: number of clips in time.
        crops: number of crops of each clip along the longer side, see `ResizeCrop.crops`.
        sampling: how the frames of each clip are chosen, one of SAMPLINGS, see `handler.video.sampling.sample_views`.
        stride_frames: distance between the frames of a clip. "dense" needs it. With "uniform" it is for training: None
            covers the whole video.
        start_s: display time in seconds from the first frame; earlier frames are not used.
        end_s: frames from this display time on are not used. None: the end of the video.
        phase: position in time, from 0 to 1, see `handler.video.sampling.sample_uniform`. Training varies it.
        zoom: see ResizeCrop. Training varies it.
        crop_at: see ResizeCrop; for a single crop. Training varies it.

    Raises:
        ConfigError: a value is invalid.
    """

    clips: int = 1
    crops: int = 1
    sampling: str = "uniform"
    stride_frames: int | None = None
    start_s: float = 0.0
    end_s: float | None = None
    phase: float = 0.5
    zoom: float = 1.0
    crop_at: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        check_integer("clips", self.clips, minimum=1)
        check_integer("crops", self.crops, minimum=1)
        check_choice("sampling", self.sampling, SAMPLINGS)
        if self.stride_frames is not None:
            check_integer("stride_frames", self.stride_frames, minimum=1)
        elif self.sampling == "dense":
            raise broken_rule("stride_frames", None, "an integer if sampling is dense")
        check_number("start_s", self.start_s, minimum=0)
        if self.end_s is not None:
            check_number("end_s", self.end_s, minimum=self.start_s, exclude_minimum=True)

    @property
    def count(self) -> int:
        """V, the number of views."""
        return self.clips * self.crops


ONE_VIEW = Views()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewDefaults:
    """The views that a deployment uses unless a request specifies them, and how many it allows.

    Attributes:
        views: clips in time x crops along the longer side, such as "4x3".
        stride_frames: distance between the frames of a clip, for "dense".
        sampling: one of SAMPLINGS.
        max_views: largest number of views of one video.

    Raises:
        ConfigError: a value is invalid.
    """

    views: str = "1x1"
    stride_frames: int = 2
    sampling: str = "uniform"
    max_views: int = 12

    def __post_init__(self) -> None:
        check_integer("max_views", self.max_views, minimum=1, maximum=64)
        check_integer("stride_frames", self.stride_frames, minimum=1, maximum=10**6)
        self.resolve()

    def resolve(
        self,
        *,
        views: str | None = None,
        stride_frames: int | None = None,
        sampling: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> Views:
        """Returns the views of one video. None means the default; for `start_s` and `end_s` the start and the end.

        Raises:
            TooManyViewsError: there are more than `max_views`.
            ConfigError: a value is invalid, or `stride_frames` is given and the sampling is not "dense".
        """
        clips, crops = parse_grid("views", self.views if views is None else views)
        if clips * crops > self.max_views:
            raise TooManyViewsError(f"expected at most {self.max_views} views, got {clips}x{crops} = {clips * crops}")
        sampling = self.sampling if sampling is None else sampling
        if sampling == "dense":
            stride_frames = self.stride_frames if stride_frames is None else stride_frames
        elif stride_frames is not None:
            raise broken_rule("stride_frames", stride_frames, f"omitted for sampling {sampling}, it is for dense")
        return Views(
            clips=clips,
            crops=crops,
            sampling=sampling,
            stride_frames=stride_frames,
            start_s=0.0 if start_s is None else start_s,
            end_s=end_s,
        )


def parse_grid(name: str, value: object) -> tuple[int, int]:
    """Returns the numbers of clips and crops in a text such as "4x3".

    Raises:
        ConfigError: it is not such a text.
    """
    match = _GRID.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise broken_rule(name, value, 'clips in time x crops along the longer side, e.g. "4x3"')
    return int(match[1]), int(match[2])
