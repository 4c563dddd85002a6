"""The low-rank decoder as two ONNX graphs, which engines run on a CPU in half of torch's time.

One graph decodes prompts up to their predicted IoU, the other makes the masks of one prompt. Their shapes are fixed,
because OpenVINO takes a third longer where a dimension is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from tinysam.everything.factored import DecodedTokens, SharedImage, Update
from tinysam.everything.low_rank import LowRankDecoder
from tinysam.runtime.engine import Engine, EngineConfig, EngineName, Precision, open_engine
from tinysam.runtime.graphs import cached_graph, default_folder, identity, quiet_export, require_finite

GRAPH_VERSION = 2
"""Raised when other graphs are exported, so that cached ones are not used."""

PROMPTS = 8
"""Decoded together: enough to share products, few enough for their matrices (1 MB a prompt) to stay in cache."""

POINT_TOKENS = 2
"""What the prompt encoder makes of a point: the point, and padding where a box could be."""


class DecoderEngines:
    """Opens the graphs of a model's mask decoder, and keeps them open. A Sam carries one as ``decoder_engines``.

    Args:
        engine: what runs them.
        graphs: where exported graphs are kept, by the hash of their weights; see ``tinysam.runtime.graphs``.
    """

    def __init__(self, engine: EngineName, graphs: Path | None = None) -> None:
        self.engine = engine
        self.graphs = graphs or default_folder()
        self._opened: dict[tuple[str, EngineConfig], tuple[Engine, Engine]] = {}

    def open(self, sam: Sam, bf16: bool) -> GraphDecoder:
        """The decoder of ``sam`` with its present weights, in bfloat16 if asked for and the processor has it.

        Raises:
            EngineError: the engine cannot run the graphs.
            FloatingPointError: a weight is NaN or infinite.
        """
        precision: Precision = "auto" if bf16 and self.engine == "openvino" else "fp32"
        config = EngineConfig(engine=self.engine, precision=precision, num_threads=torch.get_num_threads())
        encoder = sam.prompt_encoder
        modules = nn.ModuleList([sam.mask_decoder, encoder.pe_layer, encoder.no_mask_embed])
        require_finite(modules, "the checkpoint's mask decoder")
        name = identity(modules, GRAPH_VERSION, encoder.image_embedding_size)
        if (name, config) not in self._opened:
            self._opened = {(name, config): self._open(sam, name, config)}
        return GraphDecoder(sam, *self._opened[name, config])

    def _open(self, sam: Sam, name: str, config: EngineConfig) -> tuple[Engine, Engine]:
        decode = cached_graph(self.graphs / f"{name}-decode.onnx", lambda: export_decode(LowRankDecoder(sam)))
        upscale = cached_graph(self.graphs / f"{name}-upscale.onnx", lambda: export_upscale(LowRankDecoder(sam)))
        return open_engine(decode, config), open_engine(upscale, config)

    def __getstate__(self) -> dict[str, object]:
        return {"engine": self.engine, "graphs": self.graphs, "_opened": {}}


class GraphDecoder(LowRankDecoder):
    """``LowRankDecoder`` whose points are decoded by engines; other prompts and single masks by torch.

    What ``decode`` returns is valid until its next call.
    """

    def __init__(self, sam: Sam, decode_engine: Engine, upscale_engine: Engine) -> None:
        super().__init__(sam)
        self._decode_engine, self._upscale_engine = decode_engine, upscale_engine

    @torch.no_grad()
    def decode(self, image: SharedImage, sparse: Tensor, multimask_output: bool = True) -> DecodedTokens:
        n_prompts = len(sparse)
        if not multimask_output or sparse.shape[1] != POINT_TOKENS or not 0 < n_prompts <= PROMPTS:
            return super().decode(image, sparse, multimask_output)
        padding = sparse[-1:].expand(PROMPTS - n_prompts, -1, -1)
        inputs = [torch.cat([sparse, padding]), *_without_upscaled(image)]
        outputs = self._decode_engine.infer([tensor.numpy() for tensor in inputs])
        return _unflatten(self, tuple(torch.from_numpy(array)[:n_prompts] for array in outputs))

    @torch.no_grad()
    def upscale(self, image: SharedImage, decoded: DecodedTokens) -> Tensor:
        hyper, update = decoded.hyper, decoded.image
        inputs = [image.upscaled, hyper, update.inverse, cast(Tensor, update.previous), update.columns, update.rows]
        if [tuple(tensor.shape) for tensor in inputs] != self._upscale_engine.input_shapes:
            return super().upscale(image, decoded)
        [logits] = self._upscale_engine.infer([tensor.numpy() for tensor in inputs])
        return torch.from_numpy(logits)


def export_decode(decoder: LowRankDecoder) -> bytes:
    """``PROMPTS`` points and the shared image to what ``decode`` returns, as ONNX."""
    return _export(_Decode(decoder), _example(decoder))


def export_upscale(decoder: LowRankDecoder) -> bytes:
    """One decoded point to its logits, as ONNX."""
    sparse, *shared = _example(decoder)
    one = decoder.decode(_shared(shared), sparse[:1])
    update = one.image
    n_tokens, channels = decoder.position.shape
    inputs = (torch.zeros(n_tokens, channels), one.hyper, update.inverse, update.previous, update.columns, update.rows)
    return _export(_Upscale(decoder), cast(tuple[Tensor, ...], inputs))


class _Decode(nn.Module):
    def __init__(self, decoder: LowRankDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, sparse: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        decoded = self.decoder.decode(_shared(shared), sparse)
        update = decoded.image
        assert update.previous is not None, "decode() always ends with the second update"
        return decoded.predicted_iou, decoded.hyper, update.inverse, update.previous, update.columns, update.rows


class _Upscale(nn.Module):
    def __init__(self, decoder: LowRankDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, upscaled: Tensor, hyper: Tensor, *update: Tensor) -> Tensor:
        image = SharedImage(*[upscaled] * len(SharedImage._fields))
        return self.decoder.upscale(image, _unflatten(self.decoder, (hyper, hyper, *update)))


def _unflatten(decoder: LowRankDecoder, tensors: tuple[Tensor, ...]) -> DecodedTokens:
    predicted_iou, hyper, inverse, previous, columns, rows = tensors
    return DecodedTokens(predicted_iou, hyper, Update(inverse, previous, columns, rows, decoder.offset_2))


def _shared(tensors: Sequence[Tensor]) -> SharedImage:
    """The inverse of ``_without_upscaled``, with a stand-in for what only upscaling needs."""
    return SharedImage(*tensors, *tensors[:1])


def _without_upscaled(image: SharedImage) -> tuple[Tensor, ...]:
    return image[:-1]


def _example(decoder: LowRankDecoder) -> tuple[Tensor, ...]:
    channels = decoder.position.shape[1]
    image = decoder.share(torch.zeros(1, channels, *decoder.grid))
    return torch.zeros(PROMPTS, POINT_TOKENS, channels), *_without_upscaled(image)


def _export(graph: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    with quiet_export(), torch.no_grad():
        # The exporter's own optimizer turns these graphs into wrong ones (onnxscript 0.7.2); engines have theirs.
        program = torch.onnx.export(
            graph.eval(), inputs, dynamo=True, optimize=False, external_data=False, verbose=False
        )
    assert program is not None
    exported: bytes = program.model_proto.SerializeToString()
    return exported
