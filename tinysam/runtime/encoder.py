"""The module that lets a Sam carry an engine as its image encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tinysam.runtime.engine import DEFAULT_CONFIG, EngineConfig, open_engine


class EngineImageEncoder(nn.Module):
    """Image to embedding, ``(B, 3, S, S)`` to ``(B, C, S / 16, S / 16)``, computed by an engine on the CPU.

    Stands in for ``sam.image_encoder``. It has no parameters and gives no gradients; ``sam.to(device)`` moves the
    rest of the model, and embeddings are returned on the device of the images. Copies and pickles by compiling the
    graph again.

    Args:
        model: the ONNX graph, for a batch of 1; see :mod:`tinysam.runtime.engine`.
        config: how to run it.

    Attributes:
        engine: the engine, which knows its ``name`` and what it executes.
        img_size: S, in pixels.

    Raises:
        EngineError: if no engine can run the graph as asked.
        ValueError: if the graph is not one of an image encoder.
    """

    def __init__(self, model: bytes, config: EngineConfig = DEFAULT_CONFIG) -> None:
        super().__init__()
        self._model, self._config = model, config
        self.engine = open_engine(model, config)
        [shape] = self.engine.input_shapes
        if len(shape) != 4 or shape[:2] != (1, 3) or shape[2] != shape[3]:
            raise ValueError(f"an image encoder takes (1, 3, S, S), this graph takes {shape}")
        self.img_size = int(shape[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, S, S)`` float32 normalised images to ``(B, C, S / 16, S / 16)`` float32, detached.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(x.shape[1:]) != self.engine.input_shapes[0][1:]:
            raise ValueError(
                f"this encoder was exported for images of shape (B, 3, {self.img_size}, {self.img_size}), "
                f"got {tuple(x.shape)}"
            )
        images = x.detach().float().cpu().numpy()
        if not len(images):
            return x.new_empty((0, *self.engine.output_shapes[0][1:]), dtype=torch.float32)
        embeddings = np.concatenate([self.engine.run(image[None]) for image in images])
        return torch.from_numpy(embeddings).to(x.device)

    def extra_repr(self) -> str:
        engine = self.engine
        return f"img_size={self.img_size}, engine={engine.name}, precision={engine.precision}"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "config": self._config, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["config"])  # type: ignore[misc]
        self.train(state["training"])
