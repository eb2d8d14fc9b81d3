"""A linear layer whose weight exists only while it multiplies.

    y = x W^T + b,   W[r, c] = tables[r, group of c, codes[r, c]]

(SpaLLM, arXiv 2410.06364). Forward and backward decode W into a scratch that all layers share, multiply, and forget it,
so a model's memory is its codes and tables and one decoded layer. On a GPU with Triton, up to ``FUSED_TOKENS`` tokens
are multiplied by tiles of W that never reach memory. The tables are float32 whatever the model's dtype: a
step of training is below the spacing of 16-bit floats, and would be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fedzo.sketch.gpu import FUSED_TOKENS, kernels_for
from fedzo.sketch.packing import check_bits, check_shapes, columns_per_group, decode, packed_width, sum_by_code


class SketchLinear(nn.Module):
    """A linear layer of codes and tables; only the tables are trained.

    ``.to(dtype)`` and its kin cast the bias and leave the tables float32 and the codes as they are.

    Args:
        in_features: d.
        out_features: R.
        bits: Of a code: 2, 3 or 4.
        groups_per_row: G, divides d.
        bias: Whether there is one; it is not trained.
        device: Of all of it.
        dtype: Of the bias.
        name: The layer, for errors.

    Raises:
        ConfigError: ``bits`` or ``groups_per_row`` cannot be.
    """

    codes: torch.Tensor
    """uint8 [R, ceil(d * bits / 8)], a buffer; packed as ``fedzo.sketch.packing`` says."""
    by_row: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Computes the product instead, where rows have tables of their own (``fedzo.sketch.table_space``)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        groups_per_row: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "SketchLinear",
    ) -> None:
        super().__init__()
        check_bits(bits)
        columns_per_group(in_features, groups_per_row, name=name)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.groups_per_row = bits, groups_per_row
        codes = torch.zeros(out_features, packed_width(in_features, bits), dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        shape = out_features, groups_per_row, 1 << bits
        self.tables = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def of(
        cls, codes: torch.Tensor, tables: torch.Tensor, in_features: int, bias: torch.Tensor | None = None
    ) -> SketchLinear:
        """The layer of packed codes and tables that fit one another, with copies of them and of a bias [R]."""
        rows, groups, num_values = tables.shape
        layer = cls(
            in_features,
            rows,
            bits=num_values.bit_length() - 1,
            groups_per_row=groups,
            bias=bias is not None,
            dtype=None if bias is None else bias.dtype,
        )
        with torch.no_grad():
            layer.codes.copy_(codes)
            layer.tables.copy_(tables)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [R, d] of the tables as they are, a new float32 tensor: for a look, or to export it."""
        shape, device = (self.out_features, self.in_features), self.codes.device
        out = torch.empty(shape, dtype=torch.float32, device=device)
        return out if device.type == "meta" else decode(self.codes, self.tables, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] to [..., R], of x's dtype."""
        if self.by_row is not None:
            return self.by_row(x)
        return sketched_linear(x, self.tables, self.codes, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups_per_row={self.groups_per_row}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SketchLinear:
        """What ``.to``, ``.half``, ``.cuda`` and their kin call: of codes and tables they change the device alone."""
        kept = self.codes, self.tables, self.tables.grad

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            if any(tensor is one for one in kept) and new.dtype != tensor.dtype:
                return tensor.to(new.device)
            return new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def sketched_linear(
    x: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product of ``SketchLinear`` with any tables: one decoding and one product.

    For a backward it keeps x, tables and codes. The gradient of the tables is summed in their own dtype or wider.

    Args:
        x: [..., d], floating point.
        tables: [R, G, 2^bits], floating point.
        codes: Packed, uint8 [R, ceil(d * bits / 8)].
        bias: [R], of x's dtype.

    Returns:
        [..., R], of x's dtype.
    """
    y: torch.Tensor = _SketchedProduct.apply(x, tables, codes, bias)  # type: ignore[no-untyped-call]
    return y


class _SketchedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(x, tables, codes)
        check_shapes(codes, tables, x.shape[-1])
        kernels = kernels_for(x, tables.shape[2].bit_length() - 1)
        num_tokens = x.numel() // x.shape[-1]
        if kernels is None or not 0 < num_tokens <= FUSED_TOKENS:
            return F.linear(x, _decoded(codes, tables, x), bias)
        by_token = x.reshape(num_tokens, -1).contiguous()
        values = tables.to(x.dtype).contiguous()
        return kernels.product(by_token, codes.contiguous(), values, bias).view(*x.shape[:-1], len(codes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, tables, codes = ctx.saved_tensors
        grad_x = grad_tables = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ _decoded(codes, tables, x)
        if ctx.needs_input_grad[1]:
            rows, groups, k = tables.shape
            wide = torch.promote_types(x.dtype, tables.dtype)
            grad_weight = _scratch((rows, x.shape[-1]), wide, x.device)
            by_token = grad_y.reshape(-1, rows).to(wide), x.reshape(-1, x.shape[-1]).to(wide)
            torch.mm(by_token[0].T, by_token[1], out=grad_weight)
            grad_tables = sum_by_code(codes, grad_weight, groups, k.bit_length() - 1).to(tables.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(dim=0)
        return grad_x, grad_tables, None, grad_bias


# --- the scratch ------------------------------------------------------------------------------------------------------


class _Held(threading.local):
    """Of each thread: one buffer of bytes a device, as large as the largest layer yet. Layers run one after another."""

    def __init__(self) -> None:
        self.buffers: dict[torch.device, torch.Tensor] = {}


_held = _Held()


def _decoded(codes: torch.Tensor, tables: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight [R, d] in x's dtype; good until the next layer's."""
    return decode(codes, tables, _scratch((len(codes), x.shape[-1]), x.dtype, x.device))


def _scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Contiguous room on the device, with whatever was there before."""
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    buffers = _held.buffers
    if device not in buffers or buffers[device].numel() < num_bytes:
        buffers.pop(device, None)
        buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffers[device][:num_bytes].view(dtype).view(shape)


def scratch_in_use() -> object:
    """The buffers that this thread's layers write to at present: whoever wrote down their addresses holds it."""
    return tuple(_held.buffers.values())


def sketched_layers(model: nn.Module) -> dict[str, SketchLinear]:
    """The sketched layers by name, in the order of ``named_modules``; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SketchLinear)}


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tables of all sketched layers by name, in the order of ``named_parameters``; empty for a dense model."""
    return {f"{name}.tables": layer.tables for name, layer in sketched_layers(model).items()}
