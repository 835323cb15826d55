"""Refuses numbers that no score can be made of, by the name of what holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import DepgraphError


def check_weights(model: nn.Module) -> None:
    """Refuse parameters that are not finite, and buffers with a NaN.

    Parameters
    ----------
    model : nn.Module
        On any device; nothing is read of what is on the meta device.

    Raises
    ------
    DepgraphError
        Naming the first one. Infinite buffers are let pass: masks hold minus infinity.
    """
    for name, parameter in model.named_parameters():
        check_weight(name, parameter)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and buffer.isnan().any():
            raise DepgraphError(f"buffer '{name}' holds NaN; load weights that are finite")


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a parameter, or a piece of it, that is not finite."""
    if not is_finite(weight):
        raise DepgraphError(
            f"parameter '{name}' holds NaN or infinite values; load weights that are finite"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; True for one on the meta device.

    Parameters
    ----------
    tensor : Tensor
        Floating point tensors are read once and not copied, whatever their size.
    """
    if (
        tensor.is_meta
        or not tensor.numel()
        or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return True
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype.itemsize < 2:  # eight bits: few ops know them
        values = values.float()
    return all(bool(end.isfinite()) for end in values.aminmax())  # a NaN is both ends


def check_batch(inputs: Any, targets: Tensor, number: int) -> None:
    """Refuse inputs and targets that are not finite.

    Parameters
    ----------
    inputs : Tensor or tuple of Tensors
        A mask, which is nothing but zero and minus infinity, is let pass.
    targets : Tensor
    number : int
        Of the batch, from 0, for the message.

    Raises
    ------
    DepgraphError
        Naming the batch and the sample.
    """
    whats = [("inputs", leaf) for leaf in pytree.tree_leaves(inputs)] + [("targets", targets)]
    for what, tensor in whats:
        if not isinstance(tensor, Tensor) or is_finite(tensor) or _is_mask(tensor):
            continue
        wrong = (
            ~torch.isfinite(tensor).flatten(1).all(1) if tensor.dim() > 1 else ~tensor.isfinite()
        )
        sample = int(wrong.nonzero()[0])
        raise DepgraphError(
            f"the {what} of batch {number} hold NaN or infinite values (sample {sample} of the "
            "batch); leave that sample out, or mend it"
        )


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def check_seen(name: str, *statistics: Tensor) -> None:
    """Refuse what was gathered of a layer on the samples when it is not finite.

    Parameters
    ----------
    name : str
        The layer's weight.
    *statistics : Tensor

    Raises
    ------
    DepgraphError
        Naming the weight.
    """
    if not all(map(is_finite, statistics)):
        raise DepgraphError(
            f"what the layer of '{name}' reads or gives, or its gradient, is too large or not a "
            "number on these batches; check the weights and the inputs' scale"
        )


def check_outputs(shares: Tensor) -> None:
    """Refuse predicted shares of classes that are not finite."""
    if not is_finite(shares):
        raise DepgraphError(
            "the model's outputs are not finite on these batches; check the weights and the "
            "inputs' scale"
        )
