"""What damaged and hostile folders do to `depgraph.load`: ``python -m benchmarks.folders``.

Mutates every file of saved models: bytes flipped, cut, repeated and swapped, values of the JSON
replaced, names and paths put in. Each folder must load, or be refused by a `DepgraphError`; a hook
of `sys.addaudithook` watches for processes, sockets and files opened outside the folder meanwhile.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

import depgraph
from depgraph.storing.checkpoint import INDEX, index_text
from depgraph.storing.reading import checksum

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 10**9, 10**18, 1e308, 0.5, "", "x", [], {}, [[]]),
    *("../other.safetensors", "/etc/passwd", "hf-hub:a/b", "builtins:eval", "os.system", "eval"),
    *("__import__('os').system('true')", "torch.hub.load", "\ud800", "a" * 10_000, "timm", "n" * 9),
    {"object": "builtins:open"},
    {"partial": [{"object": "os:system"}, {"list": ["true"]}, {"dict": []}]},
    {"library": "timm", "name": "vit_base_patch16_224", "arguments": {"checkpoint_path": "/x.pt"}},
    {"library": "timm", "name": "vit_base_patch16_224", "arguments": {"depth": 10**7}},
    {"library": "timm", "name": "vit_base_patch16_224", "arguments": {"img_size": 2**20}},
    {"library": "transformers", "name": "pipeline", "arguments": {}},
    {"library": "transformers", "name": "AutoModel", "arguments": {"auto_map": {"a": "b--c.D"}}},
    {"library": "os", "name": "system", "arguments": {}},
)
"""What is put in the place of values of the JSON."""

NAMES = ("pretrained", "checkpoint_path", "cache_dir", "auto_map", "__class__", "forward", "eval")
"""Keys that are added to objects of the JSON."""

_INSERTED = (b"\0" * 8, b"[" * 50_000, b'{"a":' * 5_000, b"\xff", b"9" * 9_000)
_WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_REMOVING = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.symlink", "os.chmod")
_seen: list[str] | None = None
_allowed: tuple[str, ...] = ()
_hooked = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in _WATCHED or event.startswith("socket.") or event in _REMOVING:
        _seen.append(event)
    elif event == "open" and isinstance(args[0], (str, bytes)):
        name = args[0].decode(errors="replace") if isinstance(args[0], bytes) else args[0]
        writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or not name.startswith(_allowed):
            _seen.append(f"open {name}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What happens inside that has no place in loading: processes, sockets, files elsewhere.

    Files of installed packages may be read: a constructor's library is imported.
    """
    global _seen, _allowed, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # it cannot be taken away again
        _hooked = True
    roots = (str(folder), *(path for path in sys.path if path), sys.prefix, sys.base_prefix)
    _allowed, _seen = roots, []
    try:
        yield _seen
    finally:
        _seen = None


def models() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Small models of each way to be saved: of a library, with buffers, of the user's own class."""
    x = torch.zeros(1, 3, 32, 32)
    small: dict[str, Any] = {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "num_classes": 3,
        "img_size": 32,
    }
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
        model = depgraph.set_source(timm.create_model(name, **small).eval(), ("timm", name, small))
        yield name, model, x
    yield "own", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval(), x


def save_all(root: Path) -> list[Path]:
    """Saved models, one of them in shards."""
    made = []
    for name, model, x in models():
        graph = depgraph.trace(model, x)
        kept = {group.name: range(0, group.size, 2) for group in graph.prunable}
        depgraph.save(graph.plan(kept).apply(model), root / name)
        made.append(root / name)
    depgraph.save(model, root / "dense")
    shutil.copytree(made[0], root / "shards")
    shard = "model-00001-of-00001.safetensors"
    (root / "shards" / "model.safetensors").rename(root / "shards" / shard)
    text = index_text({"head.weight": shard}, 0)
    (root / "shards" / INDEX).write_text(text)
    plan = json.loads((root / "shards" / "plan.json").read_text())
    plan["checksums"][shard] = plan["checksums"].pop("model.safetensors")
    (root / "shards" / "plan.json").write_text(json.dumps(plan))
    return [*made, root / "dense", root / "shards"]


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder that is read; what was done."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != "config.json"))
    if path.suffix == ".json" and rng.random() < 0.7:
        data = json.loads(path.read_text())
        what = _mutate_json(data, rng)
        path.write_text(json.dumps(data), encoding="utf-8")
        return f"{path.name}: {what}"
    data = bytearray(path.read_bytes())
    what = rng.choice(["flip", "cut", "insert", "swap", "empty", "length", "header"])
    at = rng.randrange(max(1, min(len(data), rng.choice([16, 4096, len(data) or 1]))))
    if what == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[at:]
    elif what == "insert":
        data[at:at] = rng.choice(_INSERTED)
    elif what == "swap":
        data[at : at + 4] = data[at : at + 4][::-1]
    elif what == "empty":
        data.clear()
    elif what == "length":
        data[:8] = rng.choice([0, 1, 2**20, 2**40, 2**63]).to_bytes(8, "little")
    else:
        size = int.from_bytes(data[:8], "little")
        number = rng.choice([b"0", b"1", b"-1", b"1000000000000", b"18446744073709551615"])
        header = bytes(data[8 : 8 + size]).replace(rng.choice([b"16", b"8", b"3", b"1"]), number, 1)
        data[: 8 + size] = len(header).to_bytes(8, "little") + header
    path.write_bytes(data)
    if path.suffix == ".safetensors" and rng.random() < 0.5:  # as an attacker would
        plan = json.loads((folder / "plan.json").read_text())
        plan["checksums"][path.name] = checksum(folder, path.name)
        (folder / "plan.json").write_text(json.dumps(plan))
    return f"{path.name}: {what}"


def _mutate_json(data: Any, rng: random.Random) -> str:
    """Replace, add or drop an entry somewhere."""
    at: Any = data
    while True:
        keys: Any = list(at) if isinstance(at, dict) else range(len(at))
        if not keys:
            at = data
            continue
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.75:
            at = at[key]
            continue
        break
    what = rng.choice(["replace", "replace", "replace", "drop", "add"])
    if what == "replace":
        at[key] = rng.choice(VALUES)
    elif what == "drop":
        del at[key]
    elif isinstance(at, dict):
        at[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        at.append(rng.choice(VALUES))
    return what


def outcome(folder: Path) -> tuple[str, list[str]]:
    """What loading a folder comes to, and what was seen meanwhile."""
    with watched(folder) as seen:
        try:
            model = depgraph.load(folder)
        except depgraph.DepgraphError as error:
            result = "refused"
            if len(str(error)) > 1500:
                result = f"refused at length: {str(error)[:200]}"
        except BaseException as error:  # noqa: BLE001  that is what is looked for
            result = f"{type(error).__name__}: {str(error)[:80]}"
        else:
            result = "loaded"
            model.eval()
    return result, list(seen)


@click.command()
@click.option("--count", default=10_000, show_default=True, help="Folders to try.")
@click.option("--seed", default=0, show_default=True)
def main(count: int, seed: int) -> None:
    """Try mutated folders, and count what becomes of them."""
    rng, outcomes, odd = random.Random(seed), Counter[str](), Counter[str]()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as top:
        sources = save_all(Path(top) / "saved")
        for source in sources[:4]:
            depgraph.load(source)  # libraries are imported before anything is watched
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count):
            source = rng.choice(sources)
            folder = Path(top) / "mutated"
            shutil.copytree(source, folder)
            what = mutate(folder, rng)
            start = time.perf_counter()
            result, seen = outcome(folder)
            took = time.perf_counter() - start
            slowest = max(slowest, took)
            outcomes[result] += 1
            if seen or result not in ("refused", "loaded"):
                odd[f"{source.name}: {what}: {result}: {seen[:2]}"] += 1
            shutil.rmtree(folder)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for name, times in outcomes.most_common():
        click.echo(f"{times:6d}  {name}")
    for name, times in odd.most_common(40):
        click.echo(f"{times:6d}  ODD {name}")
    click.echo(f"slowest {slowest:.2f} s, memory grew by {more / 1024:.0f} MiB")
    if odd:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
