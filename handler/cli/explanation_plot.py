"""Draws an explanation over the frames of a video: a contact sheet (.png) or an animation (.gif, .mp4).

    sheet        up to 16 of the classified frames and, below them, the share of each time step
    animation    all classified frames, and the share of each time step with the current one highlighted

Pixels without heat are gray. Heat is drawn from yellow (low) to red (high); the outline shows what the model sees of
the frame.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from handler.cli.command import CommandError
from handler.video import VideoError, open_video

MAX_TILES, COLUMNS = 16, 8
TILE_SIDE, FRAME_SIDE = 176, 448  # longer side of a frame in pixels, in a sheet and in an animation
MARGIN, BAR_HEIGHT, MAX_BAR_WIDTH = 12, 64, 80
TITLE_SIZE, TEXT_SIZE = 20, 13
SECONDS_PER_FRAME = 0.2
MP4_REPEATS = 3  # a clip of a few seconds is over before it is understood

WHITE, BLACK, LIGHT, DARK = (255, 255, 255), (20, 20, 20), (205, 205, 205), (120, 120, 120)
YELLOW, RED = np.array([255, 225, 60], np.float32), np.array([225, 20, 20], np.float32)
ACCENT = (225, 20, 20)

Frames = npt.NDArray[np.uint8]


def plot_explanation(video: bytes | str, answer: dict[str, Any], path: Path) -> None:
    """Writes an image or an animation.

    Args:
        video: the content of the classified file, or its path.
        answer: the body of the response, with an explanation.
        path: a .png, .gif or .mp4 file.

    Raises:
        CommandError: the video cannot be read, or the file cannot be written.
    """
    try:
        _write(_Drawing(read_frames(video, answer), answer), path)
    except (VideoError, OSError) as error:
        raise CommandError(f"cannot draw {path}: {error}") from error


def _write(drawing: "_Drawing", path: Path) -> None:
    if path.suffix == ".png":
        drawing.sheet().save(path)
        return
    images = drawing.animation()
    if path.suffix == ".gif":
        duration_ms = round(1000 * SECONDS_PER_FRAME)
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0)
    else:
        path.write_bytes(_encode_mp4(images * MP4_REPEATS))


def read_frames(video: bytes | str, answer: dict[str, Any]) -> Frames:
    """Decodes the classified frames, uint8 (T, H, W, 3), by their times in the answer."""
    for stream in ("first", "best"):
        with open_video(video, stream=stream) as opened:
            if opened.info.stream == answer["video"]["stream"] or stream == "best":
                distances = np.subtract.outer(np.array(answer["video"]["frame_times_s"]), opened.pts_s)  # (T, frames)
                return opened.decode(abs(distances).argmin(1))
    raise AssertionError("unreachable")


class _Drawing:
    """The parts that sheets and animations consist of.

    Args:
        frames: uint8 (T, H, W, 3).
        answer: see `plot_explanation`.
    """

    def __init__(self, frames: Frames, answer: dict[str, Any]) -> None:
        explanation = answer["explanation"]
        self._frames = frames
        self._times_s = answer["video"]["frame_times_s"]
        self._heat = np.array(explanation["heat"], np.float32)  # (T', H', W')
        self._steps = explanation["time_steps"]
        self._region = explanation["region"]
        self._title = f"Why “{explanation['label']}” ({explanation['score']:.1%})"

    def sheet(self) -> Image.Image:
        """Returns a contact sheet."""
        numbers = np.linspace(0, len(self._frames) - 1, min(len(self._frames), MAX_TILES)).round().astype(int)
        columns = min(COLUMNS, len(numbers))
        tiles = [self._frame(number, side=TILE_SIDE) for number in numbers]
        width, height = tiles[0].size
        row_height = height + TEXT_SIZE + MARGIN
        rows = -(-len(tiles) // columns)
        top = TITLE_SIZE + 2 * MARGIN
        size = (MARGIN + columns * (width + MARGIN), top + rows * row_height + self._footer_height + MARGIN)
        image, draw = self._canvas(size)
        for position, (tile, number) in enumerate(zip(tiles, numbers)):
            left = MARGIN + position % columns * (width + MARGIN)
            upper = top + position // columns * row_height
            image.paste(tile, (left, upper))
            draw.text((left, upper + height + 2), f"{self._times_s[number]:.2f} s", BLACK, _font(TEXT_SIZE))
        self._draw_bars(draw, top=top + rows * row_height, width=size[0])
        return image

    def animation(self) -> list[Image.Image]:
        """Returns an image for each frame."""
        images = []
        for number in range(len(self._frames)):
            frame = self._frame(number, side=FRAME_SIDE)
            top = TITLE_SIZE + 2 * MARGIN
            width = max(frame.width, FRAME_SIDE) + 2 * MARGIN
            height = top + frame.height + MARGIN + self._footer_height + MARGIN
            image, draw = self._canvas((width + width % 2, height + height % 2))  # video has even sizes
            image.paste(frame, ((width - frame.width) // 2, top))
            time = f"{self._times_s[number]:.2f} s"
            draw.text((MARGIN, top + frame.height + 2), time, BLACK, _font(TEXT_SIZE))
            self._draw_bars(draw, top=top + frame.height + MARGIN, width=width, current=self._step(number))
            images.append(image)
        return images

    @property
    def _footer_height(self) -> int:
        return BAR_HEIGHT + 3 * TEXT_SIZE + MARGIN

    def _canvas(self, size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """A white image with the title and the legend."""
        image = Image.new("RGB", size, WHITE)
        draw = ImageDraw.Draw(image)
        font = _font(TITLE_SIZE)
        legend_width = 150
        title = self._title
        while draw.textlength(title, font) > size[0] - legend_width - 3 * MARGIN and len(title) > 2:
            title = title[:-2].rstrip() + "…"
        draw.text((MARGIN, MARGIN - 2), title, BLACK, font)
        ramp = np.linspace(0, 1, 60, dtype=np.float32)[None].repeat(12, 0)  # (12, 60)
        bar = Image.fromarray(_blend(np.full((12, 60, 3), 170, np.uint8), ramp))
        left = size[0] - MARGIN - legend_width
        draw.text((left, MARGIN), "no", BLACK, _font(TEXT_SIZE))
        image.paste(bar, (left + 22, MARGIN + 3))
        draw.text((left + 88, MARGIN), "high heat", BLACK, _font(TEXT_SIZE))
        return image, draw

    def _draw_bars(self, draw: ImageDraw.ImageDraw, *, top: int, width: int, current: int | None = None) -> None:
        """Draws the share of each time step in the heat; all bars in color unless one is the current one."""
        font = _font(TEXT_SIZE)
        draw.text((MARGIN, top + MARGIN // 2), "share of each time step in the heat", DARK, font)
        bottom = top + self._footer_height - TEXT_SIZE - 4
        slot = (width - 2 * MARGIN) / len(self._steps)
        highest = max(step["score"] for step in self._steps) or 1
        for index, step in enumerate(self._steps):
            center, half = MARGIN + (index + 0.5) * slot, min(0.4 * slot, MAX_BAR_WIDTH / 2)
            left, right = center - half, center + half
            upper = bottom - 1 - step["score"] / highest * BAR_HEIGHT
            draw.rectangle((left, upper, right, bottom), ACCENT if current in (None, index) else LIGHT)
            for text, place in (
                (f"{step['score']:.0%}", upper - TEXT_SIZE - 3),
                (f"{step['time_s']:.1f} s", bottom + 2),
            ):
                length = draw.textlength(text, font)
                if length <= slot:
                    draw.text((center - length / 2, place), text, BLACK, font)

    def _step(self, number: int) -> int:
        """The time step that a frame belongs to."""
        return number * len(self._heat) // len(self._frames)

    def _frame(self, number: int, *, side: int) -> Image.Image:
        """A frame with its heat, whose longer side is `side`."""
        frame = Image.fromarray(self._frames[number])
        scale = side / max(frame.size)
        size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        pixels = np.asarray(frame.resize(size, Image.Resampling.LANCZOS))  # (h, w, 3)
        left, top, width, height = (self._region[name] * scale for name in ("left", "top", "width", "height"))
        box = round(left), round(top), max(1, round(width)), max(1, round(height))
        heat = Image.fromarray(self._heat[self._step(number)]).resize(box[2:], Image.Resampling.BICUBIC)
        shown = Image.new("F", size, 0.0)
        shown.paste(heat, box[:2])
        image = Image.fromarray(_blend(pixels, np.asarray(shown).clip(0, 1)))
        if box != (0, 0, *size):
            corner = box[0] + box[2] - 1, box[1] + box[3] - 1
            ImageDraw.Draw(image).rectangle((*box[:2], *corner), outline=WHITE, width=max(1, side // 150))
        return image


def _blend(pixels: Frames, heat: npt.NDArray[np.float32]) -> Frames:
    """Colors an image (h, w, 3) by heat (h, w) from 0 to 1."""
    heat = heat[..., None]  # (h, w, 1)
    gray = 0.35 * pixels + 0.65 * pixels.mean(-1, keepdims=True)
    color = YELLOW + (RED - YELLOW) * heat
    opacity = np.minimum(1, 2.5 * heat) * 0.7
    blended: Frames = (gray * (1 - opacity) + color * opacity).round().astype(np.uint8)
    return blended


def _encode_mp4(images: Sequence[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1) / Fraction(SECONDS_PER_FRAME).limit_denominator(100))
        stream.width, stream.height = images[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image))))
        container.mux(stream.encode())
    return buffer.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
