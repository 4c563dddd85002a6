"""Masks drawn over photographs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinysam import overlay
from tinysam.lake.rle import encode_rle, rle_bbox, rle_to_uncompressed
from tinysam.overlay import draw_masks, draw_prompts, mask_colours, mask_layer

GREY = 90


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


masks_of_any_size = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda shape: arrays(bool, shape))


def test_a_masks_colour_does_not_depend_on_how_many_there_are() -> None:
    assert (mask_colours(50)[:7] == mask_colours(7)).all()


def test_neighbouring_colours_are_far_apart() -> None:
    colours = mask_colours(200).astype(int)
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100
    assert len(np.unique(colours[:60], axis=0)) == 60


def test_what_no_mask_covers_stays_as_it_was() -> None:
    pixels, mask = grey(40, 60), box_mask(40, 60, 5, 5, 20, 30)
    drawn = draw_masks(pixels, [mask])
    assert (drawn[~mask] == GREY).all()
    assert (drawn[mask] != GREY).any(axis=1).all()
    assert (pixels == GREY).all()


def test_the_smaller_mask_lies_on_top_in_whichever_order_they_come() -> None:
    whole, part = box_mask(60, 60, 0, 0, 60, 60), box_mask(60, 60, 20, 20, 40, 40)
    for masks, index in (([whole, part], 1), ([part, whole], 0)):
        layer = mask_layer(60, 60, masks)
        assert (layer[part][:, :3] == mask_colours(2)[index]).all()
        assert (layer[whole & ~part][:, :3] == mask_colours(2)[1 - index]).all()


@settings(max_examples=30, deadline=None)
@given(masks_of_any_size)
def test_a_mask_is_drawn_alike_in_every_form(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    expected = mask_layer(*mask.shape, [mask])
    assert ((expected[..., 3] > 0) == mask).all()
    for form in (rle, rle_to_uncompressed(rle), {"segmentation": mask}, {"segmentation": rle}, {**rle, "area": 1}):
        assert (mask_layer(*mask.shape, [form]) == expected).all()


@settings(max_examples=30, deadline=None)
@given(masks_of_any_size, st.integers(1, 50), st.integers(1, 50))
def test_a_mask_of_another_size_is_scaled_to_the_nearest_pixel(mask: np.ndarray, height: int, width: int) -> None:
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    expected = mask[rows][:, columns]
    for form in (mask, encode_rle(mask)):
        assert ((mask_layer(height, width, [form])[..., 3] > 0) == expected).all()


def test_the_outline_is_inside_the_mask_and_as_thick_as_asked() -> None:
    mask = box_mask(60, 60, 10, 10, 50, 50)
    outlined = draw_masks(grey(60, 60), [mask], alpha=0, outline=3)
    inner = box_mask(60, 60, 13, 13, 47, 47)
    assert (outlined[inner] == GREY).all()
    assert (outlined[mask & ~inner] != GREY).any(axis=1).all()
    assert (draw_masks(grey(60, 60), [mask], alpha=0, outline=0) == GREY).all()


def test_neighbouring_masks_have_an_outline_between_them() -> None:
    left, right = box_mask(20, 40, 0, 0, 20, 20), box_mask(20, 40, 0, 20, 20, 40)
    alpha = mask_layer(20, 40, [left, right], alpha=0.2, outline=1)[..., 3]
    assert (alpha[:, 19:21] > 200).all()
    assert (alpha[:, :19] < 60).all()


def test_bands_leave_no_seam(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    height = 3 * overlay._BAND_ROWS + 17
    masks = [rng.random((height, 20)) > 0.5 for _ in range(3)]
    pixels = rng.integers(0, 256, (height, 20, 3), dtype=np.uint8)
    banded = draw_masks(pixels, masks, outline=4)
    monkeypatch.setattr(overlay, "_BAND_ROWS", height)
    assert (draw_masks(pixels, masks, outline=4) == banded).all()


def test_drawing_equals_laying_the_layer_over_the_image(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)
    masks = [rng.random((70, 50)) > 0.7 for _ in range(5)]
    layer = mask_layer(70, 50, masks).astype(float)
    opacity = layer[..., 3:] / 255
    expected = pixels * (1 - opacity) + layer[..., :3] * opacity
    assert np.abs(draw_masks(pixels, masks) - expected).max() <= 0.51


def test_no_masks_give_the_image_back_and_empty_masks_draw_nothing() -> None:
    pixels = grey(8, 9)
    empty = np.zeros((8, 9), bool)
    assert (draw_masks(pixels, []) == pixels).all()
    assert (draw_masks(pixels, [empty, encode_rle(empty)]) == pixels).all()


def test_points_and_boxes_of_records_are_drawn_at_the_images_scale() -> None:
    mask = box_mask(50, 50, 10, 10, 20, 20)
    record = {**encode_rle(mask), "bbox": rle_bbox(encode_rle(mask)), "point_coords": [[15.0, 15.0]]}
    plain = draw_masks(grey(100, 100), [record])
    with_point = draw_masks(grey(100, 100), [record], points=True)
    with_box = draw_masks(grey(100, 100), [record], boxes=True)
    changed = np.argwhere((with_point != plain).any(axis=2))
    assert np.abs(changed.mean(axis=0) - 30).max() < 1
    changed = np.argwhere((with_box != plain).any(axis=2))
    assert np.abs(changed.min(axis=0) - 20).max() <= 2
    assert np.abs(changed.max(axis=0) - 40).max() <= 2


def test_records_without_points_or_boxes_are_drawn_without_them() -> None:
    mask = box_mask(50, 50, 10, 10, 20, 20)
    plain = draw_masks(grey(50, 50), [mask])
    for form in (mask, encode_rle(mask), {"segmentation": mask, "bbox": None, "point_coords": None}):
        assert (draw_masks(grey(50, 50), [form], points=True, boxes=True) == plain).all()


def test_prompts_are_green_on_the_object_and_red_off_it() -> None:
    drawn = draw_prompts(grey(60, 60), points=[(15, 30), (45, 30)], labels=[1, 0]).astype(int)
    assert drawn[30, 15, 1] > drawn[30, 15, 0]
    assert drawn[30, 45, 0] > drawn[30, 45, 1]


def test_a_box_typed_from_its_far_corner_is_drawn_all_the_same() -> None:
    forward = draw_prompts(grey(60, 60), boxes=[(10, 12, 40, 50)])
    assert (draw_prompts(grey(60, 60), boxes=[(40, 50, 10, 12)]) == forward).all()
    assert (forward != GREY).any()


@pytest.mark.parametrize(
    ("pixels", "mask", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), bool), "pixels must be"),
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), bool), "pixels must be"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), bool), "not a mask"),
        (np.zeros((4, 4, 3), np.uint8), {"bbox": [0, 0, 1, 1]}, "not a mask"),
    ],
)
def test_what_is_no_image_or_no_mask_is_refused(pixels: np.ndarray, mask: overlay.MaskLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_masks(pixels, [mask])


def test_an_opacity_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha"):
        mask_layer(4, 4, [np.ones((4, 4), bool)], alpha=1.5)
