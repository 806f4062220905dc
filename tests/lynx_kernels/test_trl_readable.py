"""``readable`` leaves out samples whose images would end a run."""

import io
import logging

from datasets import Dataset, Features, Image, List, Value

from lynx_kernels.integrations.trl import readable
from tests.lynx_kernels import trl_models


def png(number):
    held = io.BytesIO()
    trl_models.image(number).save(held, "PNG")
    return held.getvalue()


def test_images_that_do_not_decode_are_named_and_counted(caplog):
    cut, text = png(1)[:60], b"no image"
    one = Dataset.from_dict(
        {"image": [{"bytes": each, "path": None} for each in (png(0), cut, png(2), text)], "number": range(4)},
        features=Features({"image": Image(), "number": Value("int64")}),
    )
    with caplog.at_level(logging.WARNING, "lynx_kernels"):
        found = readable(one)
    assert found["number"][:] == [0, 2]
    assert found[1]["image"].size == (8, 8)
    assert "sample 1 is left out: " in caplog.text
    assert "sample 3 is left out: UnidentifiedImageError" in caplog.text
    assert "2 of 4 samples are left out: their images cannot be decoded" in caplog.text
    several = Dataset.from_dict(
        {"images": [[{"bytes": png(0), "path": None}, {"bytes": text, "path": None}], []]},
        features=Features({"images": List(Image())}),
    )
    assert readable(several)["images"][:] == [[]]
    assert len(readable(Dataset.from_dict({"text": ["w5"]}))) == 1
