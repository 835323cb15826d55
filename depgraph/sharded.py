"""Slices a checkpoint that does not fit into memory, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from depgraph._structure import Encoder
from depgraph.checkpoint import INDEX, WEIGHTS, Checkpoint, write_index, write_shard
from depgraph.errors import DepgraphError
from depgraph.plan import Plan
from depgraph.store import describe, move_files, write_texts

AfterPiece = Callable[[int], None]
"""Told of the bytes of each piece once it is done with."""


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Where each parameter and persistent buffer of a model is stored.

    Parameters
    ----------
    model : nn.Module
        Without weights: only shapes matter.
    checkpoint : Checkpoint

    Returns
    -------
    dict of str to str
        The name in the checkpoint, by every name that the tensor has in the model.

    Raises
    ------
    DepgraphError
        When the two do not fit; the first tensor that does not is named.
    """
    names: dict[str, str] = {}
    state = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    for same in aliases.values():
        found = next((name for name in same if name in checkpoint.tensors), None)
        if found is None:
            raise DepgraphError(f"'{checkpoint.directory}' does not fit: it has no '{same[0]}'")
        has, needs = checkpoint.tensors[found].shape, tuple(state[found].shape)
        if has != needs:
            raise DepgraphError(
                f"'{checkpoint.directory}' does not fit: '{found}' has shape {has}, the model "
                f"needs {needs}"
            )
        names.update(dict.fromkeys(same, found))
    unknown = next((name for name in checkpoint.tensors if name not in state), None)
    if unknown is not None:
        raise DepgraphError(f"'{checkpoint.directory}' does not fit: the model has no '{unknown}'")
    return names


class ShardedSlicer:
    """Writes a sliced model whose weights are in a checkpoint, and never in memory as a whole.

    Parameters
    ----------
    model : nn.Module
        The original, parameters and persistent buffers on the meta device.
    small : nn.Module
        ``plan.apply(model)``.
    plan : Plan
    checkpoint : Checkpoint
    """

    def __init__(
        self, model: nn.Module, small: nn.Module, plan: Plan, checkpoint: Checkpoint
    ) -> None:
        self.checkpoint = checkpoint
        self.encoder = Encoder(weights_elsewhere=True)
        self.texts = describe(small, self.encoder)
        stored = stored_names(model, checkpoint)
        self.source = {name: stored[name] for name in self.encoder.persistent}
        kept = {**plan.kept, **plan.kept_buffers}
        self.kept = {stored[name]: dims for name, dims in kept.items() if name in stored}
        self.files = dict(zip(checkpoint.files, _file_names(len(checkpoint.files)), strict=True))

    def write(self, folder: Path, after_piece: AfterPiece) -> None:
        """Write all files into a folder; shards that are there already are left as they are."""
        for file, new in self.files.items():
            if (folder / new).exists():
                for name in self.checkpoint.names(file):
                    after_piece(self.checkpoint.tensors[name].num_bytes)
            else:
                self._write_shard(folder / new, file, after_piece)
        if len(self.files) > 1:
            shards = {
                name: self.files[self.checkpoint.tensors[source].file]
                for name, source in self.source.items()
            }
            sizes = [
                t.numel() * self._dtype(n).itemsize for n, t in self.encoder.persistent.items()
            ]
            write_index(folder / INDEX, shards, sum(sizes))
        write_texts(folder, self.texts, self.encoder)

    def publish(self, folder: Path, directory: Path) -> None:
        """Move what `write` wrote to where the user wants it."""
        move_files(folder, directory)
        folder.rmdir()

    def _write_shard(self, path: Path, file: str, after_piece: AfterPiece) -> None:
        tensors = {
            name: (tuple(tensor.shape), self._dtype(name))
            for name, tensor in self.encoder.persistent.items()
            if self.checkpoint.tensors[self.source[name]].file == file
        }

        def pieces(name: str) -> Iterator[Tensor]:
            for start, piece in self.checkpoint.pieces(self.source[name]):
                yield self._cut(self.source[name], start, piece)
                after_piece(piece.nbytes)

        write_shard(path, tensors, pieces)

    def _cut(self, source: str, start: int, piece: Tensor) -> Tensor:
        for dim, indices in self.kept.get(source, {}).items():
            if dim == 0:
                here = (indices >= start) & (indices < start + len(piece))
                indices = indices[here] - start
            piece = piece.index_select(dim, indices)
        return piece

    def _dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.tensors[self.source[name]].dtype


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
