import copy

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant.fold import fold_batch_norm


def test_folding_keeps_the_output_and_leaves_no_batch_norm(tiny_sam: Sam) -> None:
    encoder = tiny_sam.image_encoder
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(image)
        folded = fold_batch_norm(encoder)
        torch.testing.assert_close(folded(image), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


def test_an_encoder_that_was_run_with_gradients_folds(tiny_sam: Sam) -> None:
    encoder = copy.deepcopy(tiny_sam.image_encoder.eval())
    encoder(torch.zeros(1, 3, 128, 128))  # leaves attention biases with a graph of gradients in timm's cache
    fold_batch_norm(encoder)


def test_training_mode_is_refused(tiny_sam: Sam) -> None:
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(copy.deepcopy(tiny_sam.image_encoder.eval()).train())
