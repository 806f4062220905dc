"""Records to train on: images of one colour, which a model learns to name."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}


def write_records(folder: Path, number: int, name: str = "train") -> Path:
    """A JSONL file about images of random sizes, one in four records without one, one in four a video."""
    draw = np.random.default_rng(number)
    lines = []
    for index in range(number):
        colour = list(COLOURS)[index % 3]
        if index % 4 == 3:
            content, answer = f"Say {colour} {'again ' * int(draw.integers(0, 4))}please", colour
        else:
            size = tuple(draw.integers(9, 30, 2).tolist())
            Image.new("RGB", size, COLOURS[colour]).save(folder / f"{index}.png")
            question = {"type": "text", "text": "Which colour is this?" + " Tell me." * int(draw.integers(0, 3))}
            media = {"type": "image", "path": f"{index}.png"}
            if index % 4 == 2:
                media = {"type": "video", "path": [f"{index}.png"] * 2}
            content, answer = [media, question], colour
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
