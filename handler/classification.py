"""The result of classifying one video."""

import dataclasses
from typing import Any

from handler.clips import Clip, View
from handler.protocol import render_answer
from handler.ranking import Ranking


@dataclasses.dataclass(frozen=True)
class ClassifiedView(View):
    """A view and its own labels.

    Attributes:
        frame_indices, times_s, crop: see View.
        predictions: (label, score) pairs of this view alone, best first.
    """

    predictions: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Classification(Ranking):
    """The result of classifying one video.

    Attributes:
        predictions, labels, heads: see Ranking; of the mean of the logits of all views.
        clip: the frames that were classified, and facts about the video.
        views: the V views, in the order of `Clip.views`.
    """

    clip: Clip
    views: list[ClassifiedView]

    @property
    def agreement(self) -> float:
        """The share of the views whose best label is that of the video, from 0 to 1."""
        return sum(view.predictions[0][0] == self.predictions[0][0] for view in self.views) / len(self.views)

    def to_answer(self) -> dict[str, Any]:
        """Returns the body of a server's response."""
        views = [{"predictions": view.predictions, "times_s": view.times_s, "crop": view.crop} for view in self.views]
        return render_answer(
            self.predictions,
            labels=self.labels,
            heads=self.heads,
            video=dataclasses.asdict(self.clip.info),
            frame_times_s=self.clip.times_s,
            warnings=self.clip.warnings,
            views=views,
            agreement=self.agreement if len(views) > 1 else None,
        )

    def __repr__(self) -> str:
        views, frames, height, width = len(self.views), self.clip.num_frames, *self.clip.crops[0][2:]
        info = self.clip.info
        predictions = ", ".join(f"({label!r}, {score:.4f})" for label, score in self.predictions)
        return (
            f"Classification(predictions=[{predictions}], clip=<{views} x {frames} frames of {width}x{height} from "
            f"{info.duration_s:.1f} s of {info.codec} {info.width}x{info.height}>)"
        )
