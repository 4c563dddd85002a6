"""One training step: prompts, refinements and losses for a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn

from tinysam.distill import losses
from tinysam.distill.cells import choose_cells
from tinysam.distill.decoding import Decoded, at_target_stride, cell_logits, cell_pixels, decode, dense_positions
from tinysam.distill.dense import DenseHead, dense_loss
from tinysam.distill.frame import EMBEDDING_STRIDE, LOW_RES_STRIDE, TARGET_STRIDE
from tinysam.distill.losses import LossConfig
from tinysam.distill.memory import recomputed
from tinysam.distill.prompts import PromptConfig, Prompts, first_prompts, next_points
from tinysam.distill.samples import Sample, content_mask
from tinysam.distill.teacher_masks import TeacherMaskConfig, add_teacher_masks

SINGLE_MASK = 0  # SAM's decoder predicts the unambiguous mask first, then three ambiguous ones


class SingleMask(NamedTuple):
    """A student's single-mask output for ``N`` prompts, without gradients."""

    low_res: torch.Tensor
    """``(N, 1, h, w)`` logits, as a mask prompt takes them."""
    iou: torch.Tensor
    """``(N,)`` with the ground truth."""


class Compared(NamedTuple):
    """Where masks are compared, at the resolution of their logits: ``(h, w)`` pixels, or cells and their pixels."""

    logits: torch.Tensor
    """``(N, 4, h, w)``."""
    truth: torch.Tensor
    """``(N, 1, h, w)`` coverages."""
    taught: torch.Tensor | None
    """``(N, 4, h, w)`` logits of the teacher."""
    weight: torch.Tensor | None
    """``(N, 1, h, 1)``: how many cells each stands for; None for everywhere."""


class DistillationLoss(nn.Module):
    """``L = alpha L_emb + beta L_token + gamma sum_i H_i L_output,i + L_mask + L_iou`` (TinySAM, section 3.1).

    The mask loss is SAM's focal + dice, of the single-mask output and of the best of the three ambiguous ones, so
    that both conventions of prompting learn (our choice; SAM trains the ambiguous ones on first prompts only). The
    losses of a step's rounds of prompts are averaged. A module, so that DistributedDataParallel can wrap it.

    Args:
        student: all of its parameters that need gradients are trained.
        teacher: only its prompt encoder and mask decoder are used, on the batch's cached embeddings; its parameters
            are frozen in place. None trains on ground truth alone.
        teacher_masks: what unlabelled images are taught.
        recompute_rounds: keep no activations of a round of prompts for the backward pass, as ten rounds of 64 prompts
            would need more memory than there is.
        encode: False takes a batch's cached embeddings for the student's own, and trains what follows them.
    """

    def __init__(
        self,
        student: Sam,
        teacher: Sam | None,
        loss_config: LossConfig,
        prompt_config: PromptConfig,
        teacher_masks: TeacherMaskConfig | None = None,
        *,
        recompute_rounds: bool = False,
        encode: bool = True,
    ) -> None:
        super().__init__()
        on_truth = ("focal", "dice", "cross_entropy", "iou", "dense")
        if teacher is None and not any(getattr(loss_config, name) > 0 for name in on_truth):
            raise ValueError(f"without a teacher, a loss against ground truth must be on: {', '.join(on_truth)}")
        self.student = student
        self.teacher = teacher.requires_grad_(False) if teacher is not None else None
        self.losses, self.prompts = loss_config, prompt_config
        self.teacher_masks = teacher_masks or TeacherMaskConfig()
        self.recompute_rounds, self.encode = recompute_rounds, encode
        self.dense_head = DenseHead(student.prompt_encoder.embed_dim) if loss_config.dense > 0 else None

    def forward(
        self, batch: Sample, refinements: Sequence[bool], generator: torch.Generator, autocast: torch.autocast
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of a batch, its terms for the log, and how hard each image is.

        Args:
            batch: samples stacked; ``B`` images with ``P`` masks each, on the student's device.
            refinements: from ``prompts.draw_refinements``; the same on every worker, so that none waits for another.
            generator: on the student's device; all other randomness of the prompts.
            autocast: wraps the networks, not the losses.

        Returns:
            The loss, a scalar; the terms, unweighted scalars without gradient; and ``(B,)`` by how much the teacher's
            IoU on first prompts (1 without a teacher) exceeds the student's: NaN for an image without masks, and where
            no loss needs prompts.
        """
        student, teacher, config = self.student, self.teacher, self.losses
        if self.encode:
            with autocast:
                embeddings = student.image_encoder(preprocess(student, batch.image, batch.content_size))
            embeddings = embeddings.float()
        else:
            embeddings = batch.embedding
        size = embeddings.shape[-1]
        terms: dict[str, torch.Tensor] = {}
        if self.dense_head is not None:
            predicted = self.dense_head(embeddings)
            valid = content_mask(batch.content_size, predicted.shape[-1], TARGET_STRIDE)
            terms["dense"] = dense_loss(predicted, batch.dense, valid & batch.labelled[:, None, None])
        if teacher is not None and self.encode and config.embedding > 0:
            valid = content_mask(batch.content_size, size, EMBEDDING_STRIDE)
            terms["embedding"] = losses.embedding_loss(embeddings, batch.embedding, valid, config.distance)
        if not config.needs_prompts:
            return self._summed(terms, embeddings.new_full((len(embeddings),), torch.nan))

        positions = dense_positions(student, batch.origin, size)
        if teacher is not None:
            teacher_positions = dense_positions(teacher, batch.origin, size)
            with autocast:
                batch = add_teacher_masks(teacher, batch, teacher_positions, self.teacher_masks, generator)
        targets, boxes, weight = batch.targets.flatten(0, 1).float(), batch.boxes.flatten(0, 1), batch.weight.flatten()
        # Boxes and clicks live in the model's frame, of which the batch shows crops.
        offset = (batch.origin * EMBEDDING_STRIDE).float().repeat_interleave(batch.targets.shape[1], 0)
        prompts = shifted(first_prompts(targets, boxes, self.prompts, generator), offset)
        mask_logits, difficulty = None, weight
        for number in range(len(refinements) + 1):
            taught = None
            if teacher is not None and config.needs_teacher_masks:
                with torch.no_grad(), autocast:
                    taught = decode(teacher, batch.embedding, teacher_positions, prompts, mask_logits)
            # Drawn here, as a round that is computed again must see the same.
            drawn = 0 if config.mask_cells is None else size**2
            chances = torch.rand(len(targets), drawn, generator=generator, device=generator.device)
            run = partial(recomputed, self._round) if self.recompute_rounds else self._round
            round_terms, decoded = run(
                embeddings, positions, prompts, mask_logits, taught, targets, weight, chances, autocast
            )
            for name, value in round_terms.items():
                terms[name] = terms.get(name, 0) + value / (len(refinements) + 1)
            if number == 0:
                difficulty = self._difficulty(decoded, taught, targets, weight)
                difficulty = difficulty.unflatten(0, batch.weight.shape).nanmean(1)
            if number < len(refinements):
                found = at_target_stride(decoded.low_res)[:, 0] > 0
                points, labels = next_points(targets > 0.5, found, self.prompts.policy, generator)
                prompts = prompts.extended(points + offset, labels)
                mask_logits = decoded.low_res if refinements[number] else None

        return self._summed(terms, difficulty)

    def _summed(
        self, terms: dict[str, torch.Tensor], difficulty: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """What ``forward`` returns."""
        weighted = (getattr(self.losses, name) * value for name, value in terms.items())
        total = sum(weighted, start=difficulty.new_zeros(()))
        return total, {name: value.detach() for name, value in terms.items()}, difficulty

    def _round(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        prompts: Prompts,
        mask_logits: torch.Tensor | None,
        taught: Decoded | None,
        targets: torch.Tensor,
        weight: torch.Tensor,
        chances: torch.Tensor,
        autocast: torch.autocast,
    ) -> tuple[dict[str, torch.Tensor], SingleMask]:
        """The terms of a round of prompts, and what the student's single-mask output was."""
        config = self.losses
        with autocast:
            whole = config.mask_cells is None
            decoded = decode(self.student, embeddings, positions, prompts, mask_logits, differentiable_logits=whole)
        low_res, truth = decoded.logits.float(), targets[:, None]
        count = weight.sum().clamp(min=1)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * weight).sum() / count

        pooled = _pooled(truth)
        if config.mask_cells is None:
            compared = Compared(low_res, pooled, None if taught is None else taught.logits.float(), weight=None)
        else:
            with autocast:
                compared = _in_cells(self.student, decoded, taught, pooled, chances, config.mask_cells)
        actual_iou = self._iou(low_res, truth)
        terms = {name: mean(values) for name, values in self._mask_losses(compared, truth).items()}
        if config.iou > 0:
            terms["iou"] = mean((decoded.predicted_iou.float() - actual_iou).abs().mean(1))
        if taught is not None and config.token > 0:
            terms["token"] = mean(losses.token_loss(decoded.tokens.float(), taught.tokens.float(), config.distance))
        if taught is not None and compared.taught is not None and config.output > 0:
            hardness = torch.full_like(weight, 0.5)
            if config.hard_mask_weight:
                hardness = losses.hard_mask_weight(self._single_iou(taught, truth), actual_iou[:, SINGLE_MASK])
            of_output = losses.output_loss(compared.logits, compared.taught, config, compared.weight)
            terms["output"] = mean(hardness * of_output)
        return terms, SingleMask(low_res[:, SINGLE_MASK, None].detach(), actual_iou[:, SINGLE_MASK])

    def _mask_losses(self, compared: Compared, truth: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of masks that have a weight, of the single mask and the best of the ambiguous ones: ``(N,)`` each.
        ``truth`` is ``(N, 1, H, W)`` in the targets' frame."""
        found = {
            "focal": losses.focal_loss,
            "dice": losses.dice_loss,
            "cross_entropy": losses.cross_entropy_loss,
        }
        used = {name: loss for name, loss in found.items() if getattr(self.losses, name) > 0}
        if not used:
            return {}
        # Two of the four outputs are trained, so only they are compared with gradients.
        with torch.no_grad():
            ambiguous = compared.logits[:, 1:], compared.truth, compared.weight
            best = 1 + sum(getattr(self.losses, name) * loss(*ambiguous) for name, loss in used.items()).argmin(1)
        of_best = compared.logits[torch.arange(len(best), device=best.device), best]
        trained = torch.stack([compared.logits[:, SINGLE_MASK], of_best], 1)
        if compared.weight is None:  # whole masks are resized: a student learns where in its pixels a boundary runs
            trained = at_target_stride(trained)
        else:
            truth = compared.truth
        return {name: loss(trained, truth, compared.weight).sum(1) for name, loss in used.items()}

    def _difficulty(
        self, decoded: SingleMask, taught: Decoded | None, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """``(N,)`` by how much the teacher's IoU exceeds the student's; NaN where there is no mask."""
        teacher_iou = 1.0 if taught is None else self._single_iou(taught, targets[:, None])
        return (teacher_iou - decoded.iou).masked_fill(weight == 0, torch.nan)

    def _single_iou(self, decoded: Decoded, truth: torch.Tensor) -> torch.Tensor:
        return self._iou(decoded.logits[:, SINGLE_MASK, None], truth)[:, 0]

    @torch.no_grad()
    def _iou(self, low_res: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """``(N, M)`` IoU of ``(N, M, h, w)`` logits with ``(N, 1, H, W)`` coverages, where the losses compare them."""
        if self.losses.mask_cells is not None:
            return losses.mask_iou(low_res, _pooled(truth))
        return losses.mask_iou(at_target_stride(low_res), truth)


def _pooled(truth: torch.Tensor) -> torch.Tensor:
    """Coverages of the targets' pixels as those of the logits'."""
    return F.avg_pool2d(truth, LOW_RES_STRIDE // TARGET_STRIDE)


def _in_cells(
    student: Sam, decoded: Decoded, taught: Decoded | None, truth: torch.Tensor, chances: torch.Tensor, count: int
) -> Compared:
    """Masks in ``count`` cells of the embedding; ``truth`` is ``(N, 1, h, w)`` coverages, ``chances`` ``(N, S)``."""
    covered = cell_pixels(truth)
    predicted = cell_pixels(decoded.logits.detach()).amax((1, 3)).float().sigmoid()
    cells, weight = choose_cells(torch.maximum(predicted, covered.amax((1, 3))), chances, count)

    def chosen(masks: torch.Tensor) -> torch.Tensor:
        return masks.gather(2, cells[:, None, :, None].expand(-1, masks.shape[1], -1, masks.shape[3]))

    return Compared(
        logits=cell_logits(student, decoded, cells).float(),
        truth=chosen(covered),
        taught=None if taught is None else chosen(cell_pixels(taught.logits)).float(),
        weight=weight[:, None, :, None],
    )


def preprocess(sam: Sam, images: torch.Tensor, content_size: torch.Tensor) -> torch.Tensor:
    """Normalises ``(B, 3, S, S)`` uint8 images and zeroes their padding, as ``Sam.preprocess`` does."""
    normalised = (images - sam.pixel_mean) / sam.pixel_std
    padded = normalised * content_mask(content_size, images.shape[-1], 1)[:, None]
    return padded.contiguous(memory_format=torch.channels_last)


def shifted(prompts: Prompts, offset: torch.Tensor) -> Prompts:
    """Prompts moved by ``(N, 2)`` pixels."""
    return Prompts(prompts.points + offset[:, None], prompts.labels)
