from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tinysam.distill.dense import dense_target
from tinysam.distill.samples import SampleConfig, make_sample
from tinysam.lake import schema
from tinysam.lake.codecs import Codec, encode_embedding
from tinysam.lake.images import encode_jpeg
from tinysam.lake.rle import decode_rle, encode_rle

SIZE = 128


def make_row(rng: np.random.Generator, height: int = 96, width: int = 128, masks: int = 5) -> dict[str, Any]:
    """An image whose objects are bright rectangles, so that pixels tell where the masks are."""
    pixels = np.full((height, width, 3), 30, np.uint8)
    entries = []
    for _ in range(masks):
        x, y = int(rng.integers(0, width - 24)), int(rng.integers(0, height - 24))
        w, h = (int(v) for v in rng.integers(10, 24, 2))
        pixels[y : y + h, x : x + w] = 220
        frame = np.zeros((SIZE, SIZE), bool)
        frame[y : y + h, x : x + w] = True
        stride = schema.MASK_STRIDE
        shrunk = frame.reshape(SIZE // stride, stride, SIZE // stride, stride).mean((1, 3)) > 0.5
        rle = encode_rle(shrunk)
        entries.append(
            {
                "size": rle["size"],
                "counts": rle["counts"].encode(),
                "bbox": [x, y, w, h],
                "area": float(w * h),
                "point_coords": [],
            }
        )
    embedding = rng.normal(size=(4, SIZE // 16, SIZE // 16)).astype(np.float32)
    return {
        "input_height": height,
        "input_width": width,
        "image": encode_jpeg(pixels, 100),
        "embedding": encode_embedding(embedding, "fp16"),
        "masks": entries,
        "plain_embedding": embedding,
    }


def sample(row: dict[str, Any], rng: np.random.Generator, **options: Any) -> Any:
    defaults: dict[str, Any] = {"prompts": 6, "image_size": SIZE, "embedding_shape": (4, 8, 8), "codec": "fp16"}
    config = SampleConfig(**{k: options.pop(k) for k in list(options) if k in SampleConfig.__dataclass_fields__})
    return make_sample(row, config=config, rng=rng, **{**defaults, **options})


def bright(image: torch.Tensor) -> torch.Tensor:
    """Share of bright pixels in each pixel of the targets."""
    return torch.nn.functional.avg_pool2d((image[0] > 125).float()[None], 2)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": None},
        {"crop_size": 64},
        {"crop_size": None, "flip": True, "embedding_shape": None},
        {"crop_size": 64, "flip": True, "embedding_shape": None},
        {"crop_size": 64, "min_zoom": 0.6, "max_zoom": 1.8, "embedding_shape": None},
    ],
)
def test_masks_lie_where_their_objects_are(rng: np.random.Generator, options: dict[str, Any]) -> None:
    for _ in range(10):
        made = sample(make_row(rng), rng, **options)
        covered = made.targets.amax(0)
        shown = bright(made.image)
        # Every chosen mask covers bright pixels; resampling blurs borders, so compare within.
        assert (shown[covered > 0.99] > 0.6).float().mean() > 0.95
        for target, box, weight in zip(made.targets, made.boxes, made.weight, strict=True):
            if weight == 0:
                continue
            ys, xs = torch.nonzero(target > 0.5, as_tuple=True)
            if len(ys):
                assert (xs.min() * 2 >= box[0] - 6).all()
                assert ((xs.max() + 1) * 2 <= box[2] + 6).all()
                assert (ys.min() * 2 >= box[1] - 6).all()
                assert ((ys.max() + 1) * 2 <= box[3] + 6).all()


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_embeddings_are_cropped_with_the_image(rng: np.random.Generator, codec: Codec) -> None:
    row = make_row(rng, height=128)
    row["embedding"] = encode_embedding(row["plain_embedding"], codec)
    tolerance = {"fp16": 1e-3, "int8": 2e-2}[codec]
    origins = set()
    for _ in range(20):
        made = sample(row, rng, crop_size=64, codec=codec)
        x, y = made.origin.tolist()
        origins.add((x, y))
        expected = torch.from_numpy(row["plain_embedding"][:, y : y + 4, x : x + 4])
        torch.testing.assert_close(made.embedding, expected, rtol=tolerance, atol=tolerance)
    assert len(origins) > 1


@pytest.mark.parametrize("height", [64, 75])
def test_flips_turn_the_image_and_leave_its_padding_where_it_is(rng: np.random.Generator, height: int) -> None:
    row = make_row(rng, height=height, width=128)
    plain = sample(row, rng, embedding_shape=None)
    shown = set()
    for _ in range(40):
        made = sample(row, rng, flip=True, embedding_shape=None)
        tall = made.content_size.tolist()[1] < 128
        image = made.image.transpose(1, 2) if tall else made.image
        rows = -(-height // 2) * 2
        assert image[:, rows:].max() == 0
        assert made.content_size.flip(0 if tall else ()).tolist()[0] in (height, rows)
        views = {
            (horizontal, vertical): image[:, :rows].flip([*[-1] * horizontal, *[-2] * vertical])
            for horizontal in (False, True)
            for vertical in (False, True)
        }
        (view,) = [key for key, view in views.items() if torch.equal(view, plain.image[:, :rows])]
        shown.add((tall, *view))
    assert len(shown) == 8


def test_objects_grow_or_shrink_with_their_boxes_by_a_share_of_their_size(rng: np.random.Generator) -> None:
    row = make_row(rng, height=76, masks=1)
    plain = sample(row, rng, prompts=1, embedding_shape=None)
    free = (plain.boxes[0] > 8) & (plain.boxes[0] < torch.tensor([120, 68, 120, 68]))
    assert free.any()
    share, areas = 0.4, []
    for _ in range(30):
        made = sample(row, rng, prompts=1, grow=share, embedding_shape=None)
        ys, xs = torch.nonzero(made.targets[0] > 0.5, as_tuple=True)
        tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 2
        assert ((made.boxes[0] - tight).abs() <= 2).all()
        # Not in whole pixels of the targets: a box tells a small object's size better than its pixels.
        moved = (made.boxes[0] - plain.boxes[0])[free] * torch.tensor([-1, -1, 1, 1])[free]
        torch.testing.assert_close(moved, moved[:1].expand(len(moved)))
        assert moved[0].abs() <= share * (plain.boxes[0, 2:] - plain.boxes[0, :2]).min() / 2
        assert made.targets[:, 38:].sum() == 0
        contained = made.targets[0] >= plain.targets[0].round()
        containing = made.targets[0] <= plain.targets[0].round()
        assert contained.all() or containing.all()
        areas.append(made.targets.sum().item())
    assert min(areas) < plain.targets.sum() < max(areas)
    assert len(set(areas)) == len(areas)


def test_padding_is_told_from_image(rng: np.random.Generator) -> None:
    made = sample(make_row(rng, height=50, width=128), rng)
    assert made.content_size.tolist() == [50, 128]
    assert made.image[:, 50:].max() == 0
    assert made.targets[:, 25:].sum() == 0


def test_an_image_without_masks_teaches_its_embedding_alone(rng: np.random.Generator) -> None:
    row = make_row(rng, masks=0)
    assert sample(row, rng, embedding_shape=None) is None
    made = sample(row, rng)
    assert made.weight.sum() == 0
    assert made.embedding.shape == (4, 8, 8)


def test_a_single_mask_fills_all_places(rng: np.random.Generator) -> None:
    made = sample(make_row(rng, masks=1), rng)
    assert made.targets.shape == (6, 64, 64)
    assert (made.weight == 1).all()


def test_targets_are_the_stored_masks_where_nothing_is_magnified(rng: np.random.Generator) -> None:
    row = make_row(rng, masks=1)
    made = sample(row, rng)
    np.testing.assert_array_equal(made.targets[0].numpy(), decode_rle(row["masks"][0]))


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": None},
        {"crop_size": None, "flip": True, "embedding_shape": None},
        {"crop_size": 64, "flip": True, "embedding_shape": None},
        {"crop_size": 64, "min_zoom": 0.6, "max_zoom": 1.8, "flip": True, "embedding_shape": None},
    ],
)
def test_every_pixel_tells_the_box_of_its_object(rng: np.random.Generator, options: dict[str, Any]) -> None:
    for _ in range(10):
        made = sample(make_row(rng, masks=1), rng, prompts=1, dense=True, **options)
        if made.weight[0] == 0:
            continue
        ys, xs = torch.nonzero(made.dense[0], as_tuple=True)
        x, y = (xs + 0.5) * 2, (ys + 0.5) * 2
        left, top, right, bottom = torch.sinh(made.dense[1:, ys, xs]) * 8
        side = made.image.shape[-1]
        boxes = torch.stack([x - left, y - top, x + right, y + bottom], 1).clamp(0, side)
        torch.testing.assert_close(boxes, made.boxes.expand_as(boxes), atol=1e-2, rtol=0)
        assert (made.dense[1:, made.dense[0] == 0] == 0).all()


def test_of_overlapping_objects_the_smaller_one_counts() -> None:
    inside = np.zeros((2, 8, 8), bool)
    inside[0, 2:4, 2:4] = True
    inside[1] = True
    target = dense_target(inside, np.array([[4, 4, 8, 8], [0, 0, 16, 16]], np.float32))
    assert torch.sinh(target[1, 3, 3]) * 8 == pytest.approx(3)
    assert torch.sinh(target[1, 3, 4]) * 8 == pytest.approx(9)


@pytest.mark.parametrize(("option", "value"), [("crop_size", 40), ("crop_size", 0), ("min_zoom", 0.0), ("grow", 1.0)])
def test_impossible_crops_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"crop_size|zoom|grow"):
        SampleConfig(**{option: value})  # type: ignore[arg-type]
