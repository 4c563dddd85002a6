from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.everything.decoding import EncodedImage, embedding_at
from tinysam.predictor import ResizeLongestSide


@pytest.mark.parametrize("size", [(37, 61), (140, 96), (1, 300)])
def test_points_are_looked_up_in_the_cell_that_their_prompt_falls_into(tiny_sam: Sam, size: tuple[int, int]) -> None:
    img_size = tiny_sam.image_encoder.img_size
    cells = img_size // 16
    height, width = ResizeLongestSide.get_preprocess_shape(*size, img_size)
    embedding = torch.randn((1, 5, cells, cells), generator=torch.Generator().manual_seed(1))
    encoded = EncodedImage(embedding=embedding, size=size, input_size=(height, width))
    points = np.random.default_rng(0).uniform((0, 0), size[::-1], (50, 2))
    found = embedding_at(tiny_sam, encoded, points)
    assert found.shape == (50, 5)
    for (x, y), value in zip(points, found, strict=True):
        column, row = int(x * width / size[1] // 16), int(y * height / size[0] // 16)
        torch.testing.assert_close(value, embedding[0, :, row, column])


def test_no_points_have_no_embedding(tiny_sam: Sam) -> None:
    cells = tiny_sam.image_encoder.img_size // 16
    encoded = EncodedImage(embedding=torch.zeros(1, 5, cells, cells), size=(8, 8), input_size=(128, 128))
    assert embedding_at(tiny_sam, encoded, np.zeros((0, 2))).shape == (0, 5)
