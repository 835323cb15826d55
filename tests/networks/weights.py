"""Blocks whose weights are computed from others, on (batch, tokens, channels)."""

from __future__ import annotations

from tests.networks.writer import Block, Shape

_CENTRED = """class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean(1, keepdim=True)


"""
_UNIT = """class Unit(nn.Module):
    def forward(self, weight):
        return F.normalize(weight, dim=1)


"""
_DOUBLED = """class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2 + 0.1


"""


def reparametrised(b: Block, shape: Shape) -> Shape:
    """torch's reparametrisations of one of two layers, or of both."""
    _, width = shape
    hidden = b.pick(8, 12)
    which = b.pick((True, False), (False, True), (True, True))
    sizes = ((width, hidden), (hidden, width))
    layers = [
        _wrapped(b, f"nn.Linear({i}, {o})") if wrap else b.linear(i, o)
        for wrap, (i, o) in zip(which, sizes, strict=True)
    ]
    b.line(f"x = {layers[1]}({b.activation(f'{layers[0]}(x)')})")
    return shape


def _wrapped(b: Block, layer: str) -> str:
    way = b.pick("weight_norm", "dim", "all", "spectral_norm", "Centred", "Unit", "Doubled")
    package = "torch.nn.utils.parametrizations"
    if way == "weight_norm":
        return b.module(f"{package}.weight_norm({layer})")
    if way == "dim":
        return b.module(f"{package}.weight_norm({layer}, dim=1)")
    if way == "all":
        return b.module(f"{package}.weight_norm({layer}, dim=None)")
    if way == "spectral_norm":
        return b.module(f"{package}.spectral_norm({layer})")
    code = {"Centred": _CENTRED, "Unit": _UNIT, "Doubled": _DOUBLED}[way]
    b.helpers.extend(code.split("\n") if code not in "\n".join(b.helpers) else [])
    name = b.module(layer)
    b.init.append(f"nn.utils.parametrize.register_parametrization({name}, 'weight', {way}())")
    return name


def computed(b: Block, shape: Shape) -> Shape:
    """Weights that the forward itself normalises, centres, gates or puts together."""
    _, width = shape
    hidden = b.pick(8, 12)
    one = b.linear(width, hidden)
    b.line(f"y = {b.activation(f'{one}(x)')}")
    w = b.parameter(width, hidden)
    b.line(f"w = {w}")
    weight = b.pick(
        lambda: "F.normalize(w, dim=1)",
        lambda: "F.normalize(w, dim=0)",
        lambda: "w - w.mean(1, keepdim=True)",
        lambda: "(w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt()",
        lambda: "w / w.norm()",
        lambda: "w / w.norm(dim=1, keepdim=True)",
        lambda: "w.softmax(1)",
        lambda: f"w * {b.buffer(width, hidden)}",
        lambda: f"w + {b.parameter(width, 4)} @ {b.parameter(4, hidden)}",
        lambda: "w.tanh()",
        lambda: f"torch.cat([w[:4], {b.parameter(width - 4, hidden)}])",
        lambda: "w * torch.rsqrt(w.square().mean(1, keepdim=True) + 1e-6)",
        lambda: "w * w.abs().sum()",
        lambda: "w.T.contiguous().T",
    )()
    way = b.pick("F.linear(y, {})", "y @ ({}).T", "torch.einsum('bnc,dc->bnd', y, {})")
    if b.flag(0.2):
        b.line("y = F.normalize(y, dim=-1)")
    b.line(f"x = {way.format(weight)}")
    return shape
