"""Every product of a Sam as it is computed: convolutions, deconvolutions, linear layers and products of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tinysam.quant.graph import QUERY_KEY, WEIGHTS_VALUE

ProductKind = Literal["conv", "deconv", "linear", "matmul"]
Origin = Literal["softmax", "gelu"]

MASKS = "mask_decoder.masks"
"""Name of the product of the hypernetworks' output and the upscaled embedding."""

_WITH_WEIGHT: dict[Any, ProductKind] = {F.conv2d: "conv", F.conv_transpose2d: "deconv", F.linear: "linear"}
_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_ORIGINS: dict[Any, Origin] = {
    torch.softmax: "softmax",
    torch.Tensor.softmax: "softmax",
    F.softmax: "softmax",
    F.gelu: "gelu",
}
_ORIGIN = "_tinysam_origin"
_KEEPS_ORIGIN = (torch.Tensor.view, torch.Tensor.reshape, F.dropout, torch.dropout)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product, of an activation with a weight or with another activation."""

    name: str
    """Path of its module in the Sam, with the endings of ``tinysam.quant.graph`` for the two of an attention."""
    kind: ProductKind
    origins: tuple[Origin | None, Origin | None]
    """What the left and the right side come from, where the two ranges of the paper apply."""
    module: nn.Module | None
    """The layer that holds the weight; None for ``matmul``."""


Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Handler = Callable[[Product, torch.Tensor, torch.Tensor, Compute], torch.Tensor]
"""Takes a product, its left side (the activation), its right side (the weight, or the other activation) and what
computes it; returns the result. Left and right have the shapes that torch's functions take."""


class ProductMode(TorchFunctionMode):
    """While entered, every product of ``sam``'s image encoder and mask decoder goes through ``handler``.

    The prompt encoder, which turns coordinates into tokens, is left alone.

    Args:
        sam: what runs, in its ``engine_form``; products of other models must not be computed meanwhile.
        handler: see ``Handler``.

    Raises:
        TypeError: if the model has fused attention, whose products cannot be seen.
    """

    def __init__(self, sam: Sam, handler: Handler) -> None:
        super().__init__()
        self._sam, self._handler = sam, handler
        self._modules: list[tuple[str, nn.Module]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._sam.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(lambda module, args, name=name: self._modules.append((name, module))),
                module.register_forward_hook(lambda *_: self._modules.pop() and None, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._modules.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._modules and self._modules[-1][0].startswith("prompt_encoder"):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            raise TypeError("products within fused attention cannot be seen; give the model in its engine_form")
        if func in _WITH_WEIGHT:
            name, module = self._modules[-1]
            product = Product(name=name, kind=_WITH_WEIGHT[func], origins=(_origin(args[0]), None), module=module)
            return self._handler(product, args[0], args[1], lambda a, b: func(a, b, *args[2:], **kwargs))
        if func in _MATMUL:
            return self._matmul(*args)
        result = func(*args, **kwargs)
        if func in _ORIGINS:
            setattr(result, _ORIGIN, _ORIGINS[func])
        elif func in _KEEPS_ORIGIN and _origin(args[0]) is not None:
            setattr(result, _ORIGIN, _origin(args[0]))
        return result

    def _matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        origins = (_origin(left), _origin(right))
        if origins[1] == "gelu":
            name = MASKS  # in predict_masks, which may be called directly, so that no module is entered
        elif not self._modules:
            return torch.matmul(left, right)
        else:
            name = self._modules[-1][0] + (WEIGHTS_VALUE if origins[0] == "softmax" else QUERY_KEY)
        product = Product(name=name, kind="matmul", origins=origins, module=None)
        return self._handler(product, left, right, torch.matmul)


def _origin(value: torch.Tensor) -> Origin | None:
    return getattr(value, _ORIGIN, None)
