import copy

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant.engine_form import engine_form


def test_folding_keeps_the_output_and_leaves_no_batch_norm(tiny_sam: Sam) -> None:
    encoder = tiny_sam.image_encoder
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(image)
        formed = engine_form(encoder)
        torch.testing.assert_close(formed(image), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in formed.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


@pytest.mark.parametrize("size", [112, 128, 224])
def test_windows_are_padded_cut_and_put_together_as_in_timm(size: int, tiny_sam: Sam) -> None:
    encoder = tiny_sam.image_encoder
    image = torch.randn(2, 3, size, size + 16, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = encoder(image)
        torch.testing.assert_close(engine_form(encoder)(image), expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_engine_form_stays_as_it_is(tiny_sam: Sam) -> None:
    once = engine_form(tiny_sam.image_encoder)
    twice = engine_form(once)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())


def test_an_encoder_that_was_run_with_gradients_folds(tiny_sam: Sam) -> None:
    encoder = copy.deepcopy(tiny_sam.image_encoder.eval())
    encoder(torch.zeros(1, 3, 128, 128))  # leaves attention biases with a graph of gradients in timm's cache
    engine_form(encoder)


def test_training_mode_is_refused(tiny_sam: Sam) -> None:
    with pytest.raises(ValueError, match="eval"):
        engine_form(copy.deepcopy(tiny_sam.image_encoder.eval()).train())
