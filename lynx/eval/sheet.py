"""A sheet of what a model answers, drawn."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

from lynx.data.records import Messages
from lynx.eval.accuracy import Answered
from lynx.media.images import load_image
from lynx.media.videos import load_video

_SHOWN = 4  # frames of a video file
_RIGHT, _WRONG = "#1a7f37", "#cf222e"


def answer_sheet(answered: Sequence[Answered], path: str | Path, *, columns: int = 4) -> None:
    """Draw images, or the frames of videos, with question, answer and truth; wrong answers in red.

    Args:
        answered: what to show, one cell each.
        path: the PNG to write.
        columns: cells in a row.
    """
    rows = -(-len(answered) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, each in zip(axes.flat, answered, strict=False):
        frames = _frames(each.question.messages)
        if frames:
            axis.imshow(_side_by_side(frames), interpolation="nearest")
        else:
            axis.text(0.5, 0.5, "(no image)", ha="center", va="center", color="grey", transform=axis.transAxes)
        axis.set_aspect("equal", adjustable="datalim")  # with the box's aspect: all cells alike, images centred
        axis.set_box_aspect(0.55)
        axis.set_title(_fitted(each.question.text), fontsize=9, parse_math=False)  # a "$" is a dollar
        color = _RIGHT if each.is_right else _WRONG
        text = _fitted(f"answer: {each.prediction.strip() or '(nothing)'}")
        text += "\n" + _fitted(f"truth: {' or '.join(each.question.truths)}")
        place = {"ha": "center", "va": "top", "transform": axis.transAxes}
        axis.text(0.5, -0.05, text, fontsize=10, color=color, parse_math=False, **place)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _fitted(text: str) -> str:
    """As much of a text as a cell has room for."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return "\n".join(textwrap.wrap(printable, 36, max_lines=2, placeholder=" ..."))


def _frames(messages: Messages) -> list[Image.Image]:
    frames = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                frames.append(load_image(part["image"]))
            elif part["type"] == "video" and isinstance(part["video"], list):
                frames += [load_image(frame) for frame in part["video"]]
            elif part["type"] == "video":
                frames += load_video(part["video"], _SHOWN)
    return frames


def _side_by_side(frames: list[Image.Image], gap: int = 1) -> Image.Image:
    width = sum(frame.width for frame in frames) + gap * (len(frames) - 1)
    sheet = Image.new("RGB", (width, max(frame.height for frame in frames)), "white")
    left = 0
    for frame in frames:
        sheet.paste(frame, (left, 0))
        left += frame.width + gap
    return sheet
