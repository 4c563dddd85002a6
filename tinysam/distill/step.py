"""One training step: prompts, refinements and losses for a batch of samples."""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.distill import losses
from tinysam.distill.decoding import Decoded, decode, dense_positions
from tinysam.distill.losses import LossConfig
from tinysam.distill.prompts import PromptConfig, Prompts, first_prompts, next_points
from tinysam.distill.samples import EMBEDDING_STRIDE, Sample

SINGLE_MASK = 0  # SAM's decoder predicts the unambiguous mask first, then three ambiguous ones


class DistillationLoss(nn.Module):
    """``L = alpha L_emb + beta L_token + gamma sum_i H_i L_output,i + L_mask + L_iou`` (TinySAM, section 3.1).

    The mask loss is SAM's focal + dice, of the single-mask output and of the best of the three ambiguous ones, so
    that both conventions of prompting learn (our choice; SAM trains the ambiguous ones on first prompts only). The
    losses of a step's rounds of prompts are averaged. A module, so that DistributedDataParallel can wrap it.

    Args:
        student: all of its parameters are trained.
        teacher: only its prompt encoder and mask decoder are used, on the batch's cached embeddings; its parameters
            are frozen in place. None trains on ground truth alone.
    """

    def __init__(self, student: Sam, teacher: Sam | None, loss_config: LossConfig, prompt_config: PromptConfig) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False) if teacher is not None else None
        self.losses = loss_config
        self.prompts = prompt_config

    def forward(
        self, batch: Sample, generator: torch.Generator, autocast: torch.autocast
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch and its terms, unweighted, for the log.

        Args:
            batch: samples stacked; ``B`` images with ``P`` masks each.
            generator: on the CPU; all randomness of the prompts.
            autocast: wraps the networks, not the losses.
        """
        student, teacher = self.student, self.teacher
        images = preprocess(student, batch.image, batch.content_size)
        with autocast:
            embeddings = student.image_encoder(images)
        embeddings = embeddings.float()
        size = embeddings.shape[-1]
        terms: dict[str, torch.Tensor] = {}
        if teacher is not None:
            valid = content_mask(batch.content_size, size, EMBEDDING_STRIDE)
            terms["embedding"] = losses.embedding_loss(embeddings, batch.embedding, valid)

        targets, boxes, weight = batch.targets.flatten(0, 1), batch.boxes.flatten(0, 1), batch.weight.flatten()
        # Boxes and clicks live in the model's frame, of which the batch shows crops.
        offset = (batch.origin * EMBEDDING_STRIDE).float().repeat_interleave(batch.targets.shape[1], 0)
        prompts = shifted(first_prompts(targets, boxes, self.prompts, generator), offset)
        rounds = int(torch.randint(self.prompts.max_rounds + 1, (), generator=generator))
        mask_logits = None
        for round_number in range(rounds + 1):
            with autocast:
                positions = dense_positions(student, batch.origin, size)
                decoded = decode(student, embeddings, positions, prompts, mask_logits)
            for name, value in self._round(decoded, batch, prompts, mask_logits, targets, weight).items():
                terms[name] = terms.get(name, 0) + value / (rounds + 1)
            if round_number < rounds:
                current = decoded.logits[:, SINGLE_MASK].detach().float()
                points, labels = next_points(targets > 0.5, current > 0, self.prompts.policy, generator)
                prompts = prompts.extended(points + offset, labels)
                feed_mask = torch.rand((), generator=generator) < self.prompts.mask_prompt_probability
                mask_logits = current[:, None] if feed_mask else None

        total = sum((getattr(self.losses, name) * value for name, value in terms.items()), start=torch.zeros(()))
        return total, {"loss": total.item(), **{name: value.item() for name, value in terms.items()}}

    def _round(
        self,
        decoded: Decoded,
        batch: Sample,
        prompts: Prompts,
        mask_logits: torch.Tensor | None,
        targets: torch.Tensor,
        weight: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        logits, truth = decoded.logits.float(), targets[:, None]
        count = weight.sum().clamp(min=1)
        actual_iou = losses.mask_iou(logits, truth)
        focal, dice = losses.focal_loss(logits, truth), losses.dice_loss(logits, truth)
        combined = self.losses.focal * focal + self.losses.dice * dice
        best = combined[:, 1:].detach().argmin(1, keepdim=True) + 1
        iou_error = (decoded.predicted_iou.float() - actual_iou).abs().mean(1)
        terms = {
            "focal": ((focal[:, SINGLE_MASK] + focal.gather(1, best)[:, 0]) * weight).sum() / count,
            "dice": ((dice[:, SINGLE_MASK] + dice.gather(1, best)[:, 0]) * weight).sum() / count,
            "iou": (iou_error * weight).sum() / count,
        }
        if self.teacher is None:
            return terms
        with torch.no_grad():
            positions = dense_positions(self.teacher, batch.origin, batch.embedding.shape[-1])
            taught = decode(self.teacher, batch.embedding, positions, prompts, mask_logits)
        terms["token"] = losses.token_loss(decoded.tokens.float(), taught.tokens)
        if self.losses.hard_mask_weight:
            taught_iou = losses.mask_iou(taught.logits, truth)
            hardness = losses.hard_mask_weight(taught_iou[:, SINGLE_MASK], actual_iou[:, SINGLE_MASK])
        else:
            hardness = torch.full_like(weight, 0.5)
        output = losses.output_loss(logits, taught.logits, self.losses.logit_clip)
        terms["output"] = (hardness * output * weight).sum() / count
        return terms


def preprocess(sam: Sam, images: torch.Tensor, content_size: torch.Tensor) -> torch.Tensor:
    """Normalises ``(B, 3, S, S)`` uint8 images and zeroes their padding, as ``Sam.preprocess`` does."""
    normalised = (images - sam.pixel_mean) / sam.pixel_std
    padded = normalised * content_mask(content_size, images.shape[-1], 1)[:, None]
    return padded.contiguous(memory_format=torch.channels_last)


def content_mask(content_size: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """``(B, size, size)`` bool: which cells of ``stride`` pixels show any of the image."""
    starts = torch.arange(size) * stride
    rows, columns = (starts < content_size[:, :1]), (starts < content_size[:, 1:])
    return rows[:, :, None] & columns[:, None, :]


def shifted(prompts: Prompts, offset: torch.Tensor) -> Prompts:
    """Prompts moved by ``(N, 2)`` pixels."""
    return Prompts(prompts.points + offset[:, None], prompts.labels)
