"""Images: what rows may hold, what is refused by name, folders by class, and pixels as the models' own processors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from lorabench.config.decode import InputError
from lorabench.data import images
from lorabench.data.dataset import read_data
from lorabench.data.images import Pixels, decoded, pixels, processed, varied

STILL = {"flip": 0.0, "shift": 0.0, "rotate": 0.0, "crop": 0.0, "noise": 0.0}
DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (12, 10, 3), dtype=np.uint8)


def png(array: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def by_class(root: Path, *splits: str) -> Path:
    for split in splits or ("",):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for place in range(3):
                (root / split / name / f"{place}.png").write_bytes(png(RGB // (1 + number)))
    return root


def test_all_that_a_row_may_hold_is_the_same_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RGB))
    forms = [str(tmp_path / "a.png"), png(RGB), RGB.tolist(), RGB]
    for form in forms:
        assert (decoded(form) == RGB).all()
    rows = [{"image": form} for form in [*forms, {"bytes": png(RGB), "path": None}, {"path": forms[0]}]]
    assert all((decoded(value) == RGB).all() for value in images.images(rows, "task.image", "image"))
    assert (decoded(RGB[:, :, 0]) == RGB[:, :, :1]).all()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"no image", "no image that Pillow knows"),
        (png(RGB)[:200], "cannot be read"),
        (png(RGB[:, :, 0].astype(np.uint16), "I;16"), "more than 8 bits a channel"),
        ([[1, 2], [3]], "not of one length"),
        ([[1, 256]], "from 0 to 255"),
        ([1, 2], "is no image"),
        ("gone.png", "no such file"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_told_with_its_row(value, says):
    with pytest.raises(InputError, match=rf"task.image = \"image\": row 2.*{says}"):
        list(pixels([{"image": RGB}, {"image": value}], "task.image", "image", ViTImageProcessorPil()))


def test_a_folder_by_class_has_its_splits_and_names_its_files(tmp_path):
    whole = by_class(tmp_path / "whole", "train", "val", "test")
    data = read_data(str(whole), label="label")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 6, "validation": 6, "test": 6}
    assert {row["label"] for row in data.splits["train"]} == {"cat", "dog"}
    (whole / "train" / "dog" / "1.png").write_bytes(b"torn")
    assert read_data(str(whole), label="label").fingerprint != data.fingerprint
    with pytest.raises(InputError, match=r"train/dog/1.png: cannot be read"):
        list(pixels(read_data(str(whole)).splits["train"], "task.image", "image", ViTImageProcessorPil()))
    plain = by_class(tmp_path / "plain")
    assert sum(len(rows) for rows in read_data(str(plain), label="label").splits.values()) == 6
    (plain / "cat" / "notes.txt").write_text("?")
    with pytest.raises(InputError, match=r"cat/notes.txt is no image by its name"):
        read_data(str(plain), label="label")


def test_a_folder_of_images_alone_has_no_labels(tmp_path):
    from PIL import Image

    for number in range(5):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.md").write_text("?")
    data = read_data(str(tmp_path))
    assert {row["image"] for rows in data.splits.values() for row in rows} == {*map(str, tmp_path.glob("*.png"))}
    assert not any("label" in row for rows in data.splits.values() for row in rows)
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "4.png")
    assert read_data(str(tmp_path)).fingerprint != data.fingerprint


@pytest.mark.parametrize("column", ["image", "photo.path"])
def test_images_that_rows_name_are_in_the_fingerprint(column, tmp_path):
    """As seen from the file that names them, whatever its folder is called."""
    tmp_path = tmp_path / ("long" * 40) / "of two\nlines"
    (tmp_path / "in").mkdir(parents=True)
    rows = []
    for number in range(6):
        (tmp_path / "in" / f"{number}.PNG").write_bytes(png(RGB))
        name = f"in/{number}.PNG"
        rows.append({"text": "see a.png"} | ({"image": name} if column == "image" else {"photo": {"path": name}}))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = read_data(str(tmp_path))
    assert read_data(str(tmp_path)).fingerprint == before.fingerprint
    (tmp_path / "in" / "5.PNG").write_bytes(png(RGB // 2))
    after = read_data(str(tmp_path))
    assert after.fingerprint != before.fingerprint
    found = [decoded(value) for rows in after.splits.values() for value in images.images(rows, "task.image", column)]
    assert sorted(int(each.sum()) for each in found)[0] == int((RGB // 2).sum())


def test_a_folder_without_splits_is_not_taken_for_one(tmp_path):
    plain = by_class(tmp_path / "plain")
    for folder in (plain, plain / "cat"):
        with pytest.raises(InputError, match="has no folder validation"):
            read_data(f"{folder}@validation")


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]),
        ViTImageProcessorPil(size={"height": 12, "width": 10}),
        ViTImageProcessorPil(size={"height": 8, "width": 8}, do_rescale=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.8),
    ],
    ids=["resized", "of its size", "not rescaled", "cropped"],
)
def test_pixels_are_what_the_model_s_own_processor_gives(processor):
    full = [RGB, RGB[::-1]]
    wanted = processor(full, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    found = np.stack([each.seen() for each in processed(full, processor)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_is_more_than_memory_may_hold_lies_in_a_file(monkeypatch):
    processor, rows = ViTImageProcessorPil(size={"height": 12, "width": 10}), [{"image": RGB}] * 70
    whole = list(pixels(rows, "task.image", "image", processor))
    monkeypatch.setattr(images, "HELD_BYTES", 0)
    found = list(pixels(rows, "task.image", "image", processor))
    assert isinstance(found[69].values.base, np.memmap) and whole[69].values.dtype == np.uint8
    assert all((a.values == b.values).all() for a, b in zip(found, whole, strict=True))


def test_an_image_is_varied_by_its_numbers_alone():
    image = Pixels(values=RGB.transpose(2, 0, 1), scale=np.ones((3, 1, 1), np.float32), shift=np.zeros((3, 1, 1)))
    change = {"flip": 0.5, "shift": 0.2, "rotate": 20.0, "crop": 0.3, "noise": 0.1}
    for name, amount in change.items():
        one, same, other = (varied(image, seed, **STILL | {name: amount}).seen() for seed in ((3, 0), (3, 0), (4, 7)))
        assert (one == same).all() and one.shape == image.shape and 0 <= one.min() <= one.max() <= 255
        assert (one != other).any(), name
    assert (varied(image, (0,), **STILL).seen() == image.seen()).all()
    assert (varied(image, (0,), **STILL | {"flip": 1.0}).seen() == image.seen()[:, :, ::-1]).all()


def test_noise_has_its_deviation_and_a_turn_is_scipy_s():
    from scipy.ndimage import affine_transform

    flat = Pixels(values=np.full((3, 64, 64), 128, np.uint8), scale=np.ones((3, 1, 1)), shift=np.zeros((3, 1, 1)))
    assert varied(flat, (1,), **STILL | {"noise": 0.05}).seen().std() == pytest.approx(0.05 * 255, rel=0.05)
    values, angle = RGB.transpose(2, 0, 1).astype(np.float32), 0.3
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = np.array([1.5, -0.7])
    wanted = [affine_transform(each, matrix, offset, order=1, mode="nearest") for each in values]
    np.testing.assert_allclose(images._read_at(values, matrix, offset), wanted, atol=1e-3)
