"""SamAutomaticMaskGenerator: every object of an image, by prompting a grid of points."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from segment_anything.modeling import Sam

from tinysam.everything.candidates import Candidates
from tinysam.everything.config import MaskGeneratorConfig, OutputMode, Precision
from tinysam.everything.decoders import DecodedPrompts, ImageDecoders, PromptDecoder
from tinysam.everything.decoding import EncodedImage, embed_points, encode
from tinysam.everything.grids import Crop, crops_of, layer_grids
from tinysam.everything.mask_pass import MaskFrame, mask_frame, measure, probe
from tinysam.everything.nms import suppress_by_crop, suppress_by_quality, touches_crop_edge
from tinysam.everything.run_lengths import to_segmentation
from tinysam.everything.small_regions import remove_small_regions
from tinysam.predictor import check_image

Pixels = tuple[np.ndarray, np.ndarray]
NO_PIXELS: Pixels = (np.zeros(0, np.intp), np.zeros(0, np.intp))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A crop, ready to be prompted."""

    encoded: EncodedImage
    decoder: PromptDecoder
    frame: MaskFrame


@dataclass(frozen=True, kw_only=True)
class PromptedPoints:
    """What N prompts of a crop gave."""

    masks: Candidates
    """Those that pass the filters."""

    best_iou: torch.Tensor
    """(N,) the highest predicted IoU of each prompt's masks."""

    highest: np.ndarray
    """(P,) the highest logit that any of ``masks`` has at each pixel asked about; -inf without masks."""


class SamAutomaticMaskGenerator:
    """Segments everything in an image, with segment-anything's options, defaults and records.

    The one difference in results: a mask without a pixel is never returned, whatever the thresholds.
    """

    __slots__ = ("config", "model", "point_grids", "seconds")
    config: MaskGeneratorConfig
    seconds: dict[str, float]
    """Spent by all calls so far: to ``encode`` images, ``decode`` prompts and turn logits into ``masks``."""

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        precision: Precision = "float32",
    ) -> None:
        """
        Args:
            model: any Sam, on any device.
            point_grids: instead of ``points_per_side``: for each crop layer, (N, 2) points (x, y) in 0..1.

        ``MaskGeneratorConfig`` describes the other options.

        Raises:
            ValueError: an option out of its range, or both or neither of ``points_per_side`` and ``point_grids``.
        """
        config = MaskGeneratorConfig(
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area,
            output_mode=output_mode,
            precision=precision,
        )
        self._setup(model, config, point_grids)

    def _setup(self, model: Sam, config: MaskGeneratorConfig, point_grids: Sequence[ArrayLike] | None) -> None:
        self.model = model
        self.config = config
        self.point_grids = layer_grids(config, point_grids)
        self.seconds = {"encode": 0.0, "decode": 0.0, "masks": 0.0}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @classmethod
    def from_config(cls, model: Sam, config: MaskGeneratorConfig) -> Self:
        """A generator with the options of ``config``, which must be of the kind that this class takes."""
        return cls(model, **asdict(config))

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Segments one image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            One record a mask, those of higher quality first:

            * ``segmentation``: as ``output_mode`` says.
            * ``area``: int, pixels.
            * ``bbox``: XYWH of the first and last column and row, so that a single pixel has width 0.
            * ``predicted_iou``: float, not confined to 0..1.
            * ``point_coords``: ``[[x, y]]``, the prompt.
            * ``stability_score``: float, 0..1.
            * ``crop_box``: XYWH of the crop that the mask was found in.

        Raises:
            TypeError, ValueError: it is not such an image.
            FloatingPointError: the model's weights produce NaN or infinity.
        """
        return self.generate_batch([image])[0]

    def generate_batch(self, images: Sequence[np.ndarray], encoder_batch_size: int = 1) -> list[list[dict[str, Any]]]:
        """Segments images of any sizes; their records, in order.

        Args:
            images: as for ``generate``.
            encoder_batch_size: images or crops that are embedded together; more than one pays on a GPU only.

        Raises:
            ValueError: ``encoder_batch_size`` is below 1; and what ``generate`` raises.
        """
        if encoder_batch_size < 1:
            raise ValueError(f"encoder_batch_size must be at least 1, not {encoder_batch_size}")
        images = [check_image(image) for image in images]
        config = self.config
        work = [
            (index, crop)
            for index, image in enumerate(images)
            for crop in crops_of(image.shape[:2], config.crop_n_layers, config.crop_overlap_ratio)
            if len(self.point_grids[crop.layer])
        ]
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        decoders = ImageDecoders(self.model, dtype)
        found: list[list[Candidates]] = [[] for _ in images]
        for start in range(0, len(work), encoder_batch_size):
            batch = work[start : start + encoder_batch_size]
            pixels = [images[index][crop.y0 : crop.y1, crop.x0 : crop.x1] for index, crop in batch]
            with self._stage("encode"):
                encoded = encode(self.model, pixels, dtype)
            for (index, crop), one in zip(batch, encoded, strict=True):
                image_size = images[index].shape[:2]
                scene = self._scene(crop, image_size, one, decoders)
                candidates = self._segment(scene, self.point_grids[crop.layer])
                found[index].append(suppress_by_quality(candidates, config.box_nms_thresh))
        return [self._finish(parts, image.shape[:2]) for parts, image in zip(found, images, strict=True)]

    def _scene(self, crop: Crop, image_size: tuple[int, int], encoded: EncodedImage, decoders: ImageDecoders) -> Scene:
        with self._stage("decode"):
            decoder = decoders.of(encoded.embedding, prompts=len(self.point_grids[crop.layer]), tokens=2)
        frame = mask_frame(
            crop,
            image_size,
            encoded.input_size,
            self.model.image_encoder.img_size,
            self.model.prompt_encoder.mask_input_size,
        )
        return Scene(encoded=encoded, decoder=decoder, frame=frame)

    def _segment(self, scene: Scene, grid: np.ndarray) -> Candidates:
        """All masks of one crop that pass the filters, duplicates included."""
        return self._prompt(scene, grid * scene.encoded.size[::-1]).masks

    @property
    def _min_iou(self) -> float:
        """Masks whose predicted IoU is not above this are dropped."""
        return self.config.pred_iou_thresh if self.config.pred_iou_thresh > 0 else -np.inf

    def _prompt(self, scene: Scene, points: np.ndarray, probed: Pixels = NO_PIXELS) -> PromptedPoints:
        """Prompts ``points`` (N, 2), in pixels of the crop, and looks up the logits at the crop's ``probed`` pixels."""
        config, frame = self.config, scene.frame
        masks, best_iou = [], [torch.zeros(0, device=self.model.device)]
        highest = np.full(len(probed[0]), -np.inf, np.float32)
        for start in range(0, len(points), config.points_per_batch):
            batch = points[start : start + config.points_per_batch]
            with self._stage("decode"):
                decoded = scene.decoder.decode(embed_points(self.model, scene.encoded, batch), self._min_iou)
                best_iou.append(decoded.predicted_iou.amax(1))
            with self._stage("masks"):
                candidates, kept = self._measure(decoded, batch, frame)
                masks.append(candidates.select(kept))
                if len(highest) and kept.any():
                    logits = decoded.logits[torch.from_numpy(kept).to(decoded.logits.device)]
                    highest = np.maximum(highest, probe(logits, frame, *probed).max(0))
        return PromptedPoints(masks=Candidates.concatenate(masks), best_iou=torch.cat(best_iou), highest=highest)

    def _measure(self, decoded: DecodedPrompts, points: np.ndarray, frame: MaskFrame) -> tuple[Candidates, np.ndarray]:
        """The masks decoded from ``points``, and which of them (N,) pass the filters."""
        config = self.config
        prompt = decoded.kept.nonzero()[:, 0].cpu().numpy()
        measured = measure(decoded.logits, frame, self.model.mask_threshold, config.stability_score_offset)
        kept = (measured.areas > 0) & ~touches_crop_edge(measured.boxes, frame.crop, frame.image_size)
        if config.stability_score_thresh > 0:
            kept &= measured.stability_score >= config.stability_score_thresh
        candidates = Candidates(
            run_lengths=measured.run_lengths,
            boxes=measured.boxes,
            areas=measured.areas,
            predicted_iou=decoded.predicted_iou[decoded.kept].cpu().numpy(),
            stability_score=measured.stability_score,
            points=points[prompt] + (frame.crop.x0, frame.crop.y0),
            crop_boxes=np.tile(frame.crop.box, (len(prompt), 1)),
        )
        return candidates, kept

    def _finish(self, parts: list[Candidates], image_size: tuple[int, int]) -> list[dict[str, Any]]:
        """Merges the crops' masks into records."""
        config = self.config
        candidates = Candidates.concatenate(parts)
        if config.crop_n_layers:
            candidates = suppress_by_crop(candidates, config.crop_nms_thresh)
        if config.min_mask_region_area:
            candidates = remove_small_regions(
                candidates,
                image_size,
                config.min_mask_region_area,
                max(config.box_nms_thresh, config.crop_nms_thresh),
            )
        return [
            {
                "segmentation": to_segmentation(candidates.run_lengths[i], image_size, config.output_mode),
                "area": int(candidates.areas[i]),
                "bbox": _to_xywh(candidates.boxes[i]),
                "predicted_iou": float(candidates.predicted_iou[i]),
                "point_coords": [candidates.points[i].tolist()],
                "stability_score": float(candidates.stability_score[i]),
                "crop_box": _to_xywh(candidates.crop_boxes[i]),
            }
            for i in range(len(candidates))
        ]


def _to_xywh(box: np.ndarray) -> list[int]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
