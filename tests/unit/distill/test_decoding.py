from __future__ import annotations

import torch
from segment_anything.modeling import Sam

from tinysam.distill.decoding import cell_logits, cell_pixels, decode, dense_positions
from tinysam.distill.prompts import Prompts


@torch.no_grad()
def test_several_images_decode_as_segment_anything_decodes_each(tiny_sam: Sam) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(2, 32, 8, 8)
    points, labels = torch.rand(6, 2, 2) * 128, torch.tensor([1, -1]).expand(6, 2)
    mask_logits = torch.randn(6, 1, 32, 32)
    positions = dense_positions(tiny_sam, torch.zeros(2, 2, dtype=torch.long), 8)
    for masks in (None, mask_logits):
        decoded = decode(tiny_sam, embeddings, positions, Prompts(points, labels), masks)
        for image in range(2):
            mine = slice(image * 3, image * 3 + 3)
            sparse, dense = tiny_sam.prompt_encoder(
                points=(points[mine, :1], labels[mine, :1]), boxes=None, masks=None if masks is None else masks[mine]
            )
            logits, iou = tiny_sam.mask_decoder.predict_masks(
                image_embeddings=embeddings[image : image + 1],
                image_pe=tiny_sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            torch.testing.assert_close(decoded.logits[mine], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(decoded.predicted_iou[mine], iou, rtol=1e-4, atol=1e-4)


def test_positions_of_a_crop_are_cut_from_the_frames(tiny_sam: Sam) -> None:
    frame = tiny_sam.prompt_encoder.get_dense_pe()[0]
    crops = dense_positions(tiny_sam, torch.tensor([[0, 0], [5, 2]]), 3)
    assert torch.equal(crops[0], frame[:, :3, :3])
    assert torch.equal(crops[1], frame[:, 2:5, 5:8])


def test_logits_of_some_cells_are_those_of_the_whole_masks(tiny_sam: Sam) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(2, 32, 8, 8)
    prompts = Prompts(torch.rand(6, 2, 2) * 128, torch.tensor([1, -1]).expand(6, 2))
    positions = dense_positions(tiny_sam, torch.zeros(2, 2, dtype=torch.long), 8)
    cells = torch.stack([torch.randperm(64)[:9] for _ in range(6)])
    decoded = decode(tiny_sam, embeddings, positions, prompts, differentiable_logits=False)
    found = cell_logits(tiny_sam, decoded, cells)
    for prompt, chosen in enumerate(cells.tolist()):
        for number, cell in enumerate(chosen):
            y, x = cell // 8 * 4, cell % 8 * 4
            expected = decoded.logits[prompt, :, y : y + 4, x : x + 4].flatten(1)
            torch.testing.assert_close(found[prompt, :, number], expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(cell_pixels(decoded.logits)[prompt, :, cell], expected)
    assert found.requires_grad
    assert not decoded.logits.requires_grad
