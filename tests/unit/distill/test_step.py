from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torchvision.ops import sigmoid_focal_loss

from tinysam.distill import step
from tinysam.distill.cache import open_cache
from tinysam.distill.decoding import decode, dense_positions
from tinysam.distill.groups import Group
from tinysam.distill.loading import Reading, load_batches
from tinysam.distill.losses import TERMS, LossConfig
from tinysam.distill.memory import recompute_blocks
from tinysam.distill.prompts import PromptConfig, first_prompts
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.step import DistillationLoss

PLAIN = torch.autocast("cpu", enabled=False)
REFINEMENTS = [False, True]


@pytest.fixture
def batch(make_cache: Callable[..., str]) -> Sample:
    """Two crops with three masks each."""
    cache = open_cache([make_cache("c", shards=1)])
    reading = Reading(
        groups=[Group(offset=0, shards=(0,), steps=1)],
        samples=SampleConfig(crop_size=64),
        prompts=3,
        dense=True,
        batch_size=2,
    )
    return next(load_batches(cache, reading, processes=0))


def forward(
    student: Sam,
    teacher: Sam | None,
    batch: Sample,
    losses: LossConfig | None = None,
    *,
    refinements: Sequence[bool] = REFINEMENTS,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    module = DistillationLoss(student.train(), teacher, losses or LossConfig(), PromptConfig(per_image=3), **options)
    return module(batch, refinements, torch.Generator().manual_seed(0), PLAIN)


def gradients(sam: Sam) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in sam.named_parameters() if p.grad is not None}


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_sam: Sam, batch: Sample) -> None:
    config = LossConfig(
        embedding=2.0, token=0.5, output=0.25, focal=3.0, dice=1.5, cross_entropy=0.3, iou=0.1, dense=0.7
    )
    loss, terms, _ = forward(copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam), batch, config)
    assert set(terms) == set(TERMS)
    expected = sum(getattr(config, name) * value for name, value in terms.items())
    torch.testing.assert_close(loss.detach(), expected)


def test_from_its_own_cached_embeddings_a_decoder_learns_what_it_does_behind_its_encoder(
    tiny_sam: Sam, batch: Sample
) -> None:
    config = LossConfig(embedding=0.0, token=0.0, output=0.0)
    whole, decoder = copy.deepcopy(tiny_sam).eval(), copy.deepcopy(tiny_sam)
    decoder.image_encoder = torch.nn.Identity()  # of which nothing is asked
    with torch.no_grad():
        batch = replace(batch, embedding=whole.image_encoder(step.preprocess(whole, batch.image, batch.content_size)))
    options = PromptConfig(per_image=3)
    losses = [
        DistillationLoss(whole, None, config, options),
        DistillationLoss(decoder, None, config, options, encode=False),
    ]
    results = [loss(batch, REFINEMENTS, torch.Generator().manual_seed(0), PLAIN)[0] for loss in losses]
    for result in results:
        result.backward()
    torch.testing.assert_close(results[1], results[0])
    expected = {k: v for k, v in gradients(whole).items() if not k.startswith("image_encoder")}
    found = gradients(decoder)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("cells", [None, 16], ids=["whole masks", "all of their cells"])
def test_a_round_is_the_papers_equation_to_its_gradient(tiny_sam: Sam, batch: Sample, cells: int | None) -> None:
    """Against a transcription in float64 that takes no shortcut: all outputs resized, and the best one chosen last.
    Cells are compared at the resolution of the logits."""
    teacher, student = copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam)
    with torch.no_grad():
        for value in teacher.mask_decoder.parameters():
            value.mul_(1.2)
    batch.weight[0, 1] = 0
    batch.content_size[1] = 40  # the rest is padding
    reference = copy.deepcopy(student).train()
    loss, _, _ = forward(student, teacher, batch, LossConfig(mask_cells=cells), refinements=[])
    loss.backward()

    embeddings = reference.image_encoder(step.preprocess(reference, batch.image, batch.content_size))
    targets, weight = batch.targets.flatten(0, 1), batch.weight.flatten()
    prompts = first_prompts(targets, batch.boxes.flatten(0, 1), PromptConfig(), torch.Generator().manual_seed(0))
    prompts = step.shifted(prompts, (batch.origin * 16).float().repeat_interleave(3, 0))
    outputs = []
    for sam, embedding in ((reference, embeddings), (teacher, batch.embedding)):
        outputs.append(decode(sam, embedding, dense_positions(sam, batch.origin, 4), prompts))
    mine, theirs = outputs

    truth = targets[:, None].double() if cells is None else F.avg_pool2d(targets[:, None].double(), 2)

    def resized(logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits.double(), size=truth.shape[2:], mode="bilinear")

    def iou(logits: torch.Tensor) -> torch.Tensor:
        predicted, actual = resized(logits) > 0, truth[:, :1] > 0.5
        return (predicted & actual).sum((2, 3)) / (predicted | actual).sum((2, 3)).clamp(min=1)

    truth = truth.expand(-1, 4, -1, -1)
    logits = resized(mine.logits)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    against_truth = 20 * sigmoid_focal_loss(logits, truth).mean((2, 3)) + dice
    mask_loss = against_truth[:, 0] + against_truth[:, 1:].min(1).values
    iou_loss = (mine.predicted_iou - iou(mine.logits)).abs().mean(1)
    token_loss = (mine.tokens - theirs.tokens).abs().mean((1, 2))
    hardness = torch.sigmoid(iou(theirs.logits)[:, 0] / (iou(mine.logits)[:, 0] + 1e-6) - 1)
    output_loss = (mine.logits.clamp(-20, 20) - theirs.logits.clamp(-20, 20)).abs().mean((1, 2, 3))
    shown = torch.stack([torch.ones(4, 4), F.pad(torch.ones(3, 3), (0, 1, 0, 1))])[:, None] > 0
    embedding_loss = (embeddings - batch.embedding).abs()[shown.expand_as(embeddings)].mean()
    each = token_loss + hardness.detach() * output_loss + mask_loss + iou_loss
    expected = embedding_loss + (each * weight).sum() / weight.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in gradients(reference).items():
        torch.testing.assert_close(gradients(student)[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_weight_zero_is_not_computed(tiny_sam: Sam, batch: Sample, term: str) -> None:
    config = LossConfig(**{"dense": 1.0, "cross_entropy": 1.0, term: 0.0})
    _, terms, _ = forward(copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam), batch, config)
    assert set(terms) == set(TERMS) - {term}


def test_embeddings_alone_need_no_decoder(tiny_sam: Sam, batch: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = LossConfig(embedding=2.0, token=0, output=0, focal=0, dice=0, iou=0)
    whole = forward(copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam), batch)[1]["embedding"]
    monkeypatch.delattr(step, "decode")
    monkeypatch.delattr(step, "add_teacher_masks")
    student = copy.deepcopy(tiny_sam)
    loss, terms, difficulty = forward(student, copy.deepcopy(tiny_sam), batch, alone)
    loss.backward()
    assert set(terms) == {"embedding"}
    torch.testing.assert_close(terms["embedding"], whole)
    torch.testing.assert_close(loss.detach(), 2 * whole)
    assert difficulty.isnan().all()
    assert {name.split(".")[0] for name in gradients(student)} == {"image_encoder"}


def test_nothing_to_learn_from_is_refused(tiny_sam: Sam) -> None:
    alone = LossConfig(token=0, output=0, focal=0, dice=0, iou=0)
    with pytest.raises(ValueError, match="without a teacher"):
        DistillationLoss(tiny_sam, None, alone, PromptConfig())


def test_the_teacher_decodes_only_where_something_compares_with_its_masks(
    tiny_sam: Sam, batch: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked = copy.deepcopy(tiny_sam), []

    def counted(sam: Sam, *arguments: Any, **options: Any) -> Any:
        asked.append(sam is teacher)
        return decode(sam, *arguments, **options)

    monkeypatch.setattr(step, "decode", counted)
    forward(copy.deepcopy(tiny_sam), teacher, batch, LossConfig(token=0, output=0))
    assert asked == [False] * 3
    asked.clear()
    forward(copy.deepcopy(tiny_sam), teacher, batch, LossConfig(token=0))
    assert asked == [True, False] * 3


@pytest.mark.parametrize("options", [{"distance": "mse"}, {"output_kind": "focal_dice"}, {"hard_mask_weight": False}])
def test_alternatives_give_other_losses_that_can_be_trained_on(
    tiny_sam: Sam, batch: Sample, options: dict[str, Any]
) -> None:
    teacher = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        for value in teacher.mask_decoder.parameters():
            value.mul_(1.1)
    student = copy.deepcopy(tiny_sam)
    usual, _, _ = forward(copy.deepcopy(tiny_sam), teacher, batch)
    loss, _, _ = forward(student, teacher, batch, LossConfig(**options))
    assert loss.item() != pytest.approx(usual.item())
    loss.backward()
    assert all(value.isfinite().all() for value in gradients(student).values())


@pytest.mark.parametrize("cells", [None, 6])
def test_recomputed_rounds_give_the_same_gradients(tiny_sam: Sam, batch: Sample, cells: int | None) -> None:
    kept, recomputed = copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam)
    config = LossConfig(mask_cells=cells)
    for student, recompute in ((kept, False), (recomputed, True)):
        forward(student, copy.deepcopy(tiny_sam), batch, config, recompute_rounds=recompute)[0].backward()
    expected, found = gradients(kept), gradients(recomputed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_auxiliary_task_reaches_the_image_encoder_alone(tiny_sam: Sam, batch: Sample) -> None:
    student = copy.deepcopy(tiny_sam)
    only = LossConfig(embedding=0, token=0, output=0, focal=0, dice=0, iou=0, dense=1)
    forward(student, None, batch, only)[0].backward()
    reached = {name.split(".")[0] for name, value in gradients(student).items() if value.any()}
    assert reached == {"image_encoder"}


def saved_bytes(run: Callable[[], object]) -> int:
    """What the forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


def test_recomputed_rounds_keep_less_for_the_backward_pass(tiny_sam: Sam, batch: Sample) -> None:
    student, teacher = copy.deepcopy(tiny_sam), copy.deepcopy(tiny_sam)

    def of_a_round(recompute: bool) -> float:
        one, four = (
            saved_bytes(partial(forward, student, teacher, batch, refinements=rounds, recompute_rounds=recompute))
            for rounds in ([], [False] * 3)
        )
        return (four - one) / 3

    assert of_a_round(True) < of_a_round(False) / 20


def test_few_cells_keep_less_for_the_backward_pass(tiny_sam: Sam, batch: Sample) -> None:
    def of_a_round(cells: int | None) -> int:
        student, config = copy.deepcopy(tiny_sam), LossConfig(mask_cells=cells)
        one, two = (
            saved_bytes(partial(forward, student, None, batch, config, refinements=rounds)) for rounds in ([], [False])
        )
        return two - one

    assert of_a_round(4) < 0.8 * of_a_round(None)


def test_recomputed_blocks_change_nothing_but_memory(tiny_sam: Sam) -> None:
    kept, recomputed = (copy.deepcopy(tiny_sam.image_encoder).train() for _ in range(2))
    recompute_blocks(recomputed)
    images = torch.randn(2, 3, 64, 64)
    used = []
    for encoder in (kept, recomputed):
        used.append(saved_bytes(partial(encoder, images)))
        encoder.load_state_dict(tiny_sam.image_encoder.state_dict())
        encoder(images).square().mean().backward()
    assert used[1] < used[0] / 2
    assert kept.state_dict().keys() == recomputed.state_dict().keys()
    for (name, value), other in zip(kept.state_dict().items(), recomputed.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)  # BatchNorm's running statistics among them
    for (name, value), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, value.grad, msg=name)


def test_an_image_is_as_hard_as_the_teacher_is_better(tiny_sam: Sam, batch: Sample) -> None:
    batch.weight[1] = 0
    _, _, as_good = forward(copy.deepcopy(tiny_sam), None, batch)
    assert 0 <= as_good[0] <= 1  # without a teacher: by how much the student misses perfection
    assert as_good[1].isnan()  # nothing on it to be wrong about
    student = copy.deepcopy(tiny_sam).eval()
    module = DistillationLoss(student, copy.deepcopy(tiny_sam), LossConfig(), PromptConfig())
    with torch.no_grad():
        embedding = student.image_encoder(step.preprocess(student, batch.image, batch.content_size))
        same = Sample(**{**vars(batch), "embedding": embedding})
        _, _, difficulty = module(same, [], torch.Generator().manual_seed(0), PLAIN)
    assert difficulty[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("labelled", [True, False])
def test_a_gpu_takes_the_same_step(tiny_sam: Sam, batch: Sample, labelled: bool) -> None:
    batch = Sample(**{**vars(batch), "labelled": torch.full((2,), labelled)}).pin_memory().to("cuda")
    student, teacher = copy.deepcopy(tiny_sam).cuda().train(), copy.deepcopy(tiny_sam).cuda()
    module = DistillationLoss(student, teacher, LossConfig(), PromptConfig(), recompute_rounds=True)
    generator = torch.Generator("cuda").manual_seed(0)
    loss, _, _ = module(batch, REFINEMENTS, generator, torch.autocast("cuda", torch.bfloat16))
    loss.backward()
    assert all(value.isfinite().all() for value in gradients(student).values())
