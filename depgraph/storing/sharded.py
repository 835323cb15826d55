"""Slices a checkpoint that does not fit into memory, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from depgraph.coupling.axes import select_indices
from depgraph.errors import DepgraphError
from depgraph.plan import Plan
from depgraph.rescaling.temperature import multiply
from depgraph.storing.checkpoint import INDEX, WEIGHTS, Checkpoint, Stored, index_text, write_shard
from depgraph.storing.describe import describe
from depgraph.storing.folder import move_files
from depgraph.storing.store import remember, write_texts

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
    stored : mapping of str to str
        See `stored_names`.
    small : nn.Module
        ``plan.apply(model)``, parameters and persistent buffers on the meta device.
    plan : Plan
    checkpoint : Checkpoint
    """

    def __init__(
        self, stored: Mapping[str, str], small: nn.Module, plan: Plan, checkpoint: Checkpoint
    ) -> None:
        self.checkpoint = checkpoint
        self.small, self.saved = small, describe(small)
        self.source = {name: stored[name] for name in self.saved.weights}
        kept = {**plan.kept, **plan.kept_buffers}
        self.factors = [
            (stored[name], mask, factor)
            for applied in vars(small).get("depgraph_plans", [])[-1:]
            for name, mask, factor in applied.factors
        ]
        self.kept = {stored[name]: dims for name, dims in kept.items() if name in stored}
        self.files = dict(zip(checkpoint.files, _file_names(len(checkpoint.files)), strict=True))

    def _index(self) -> str:
        tensors = self.saved.weights.items()
        total = sum(tensor.numel() * self._stored(name).dtype.itemsize for name, tensor in tensors)
        return index_text({name: self.files[self._stored(name).file] for name, _ in tensors}, total)

    def _stored(self, name: str) -> Stored:
        return self.checkpoint.tensors[self.source[name]]

    def write(self, folder: Path, after_piece: AfterPiece) -> None:
        """Write all files into a folder; shards that are there already are left as they are."""
        for left in folder.glob(".*.tmp"):  # by what was killed
            left.unlink()
        for file, new in self.files.items():
            if (folder / new).exists():
                after_piece(self.checkpoint.num_bytes(file))
            else:
                self._write_shard(folder / new, file, after_piece)
        if len(self.files) > 1:
            (folder / INDEX).write_text(self._index(), encoding="utf-8")
        write_texts(folder, self.saved)

    def publish(self, folder: Path, directory: Path) -> None:
        """Move what `write` wrote to where the user wants it."""
        move_files(folder, directory)
        folder.rmdir()
        remember(self.saved.manifest, self.small)

    def _write_shard(self, path: Path, file: str, after_piece: AfterPiece) -> None:
        tensors = {
            name: (tuple(tensor.shape), self._stored(name).dtype)
            for name, tensor in self.saved.weights.items()
            if self._stored(name).file == file
        }

        def pieces(name: str) -> Iterator[Tensor]:
            for start, piece in self.checkpoint.pieces(self.source[name]):
                yield self._cut(self.source[name], start, piece)
                after_piece(piece.nbytes)

        write_shard(path, tensors, pieces)

    def _cut(self, source: str, start: int, piece: Tensor) -> Tensor:
        for name, mask, factor in self.factors:
            if name == source:
                multiply(piece, mask[start : start + len(piece)], factor)
        indices = dict(self.kept.get(source, {}))
        if 0 in indices:
            rows = indices[0]
            indices[0] = rows[(rows >= start) & (rows < start + len(piece))] - start
        return select_indices(piece, indices)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
