"""Blocks on tokens that people write less often, and that an engine meets all the same."""

from __future__ import annotations

from tests.networks.writer import MOST_TOKENS, Block, Shape


def outer(b: Block, shape: Shape) -> Shape:
    """Products of every channel with every other."""
    _, width = shape
    one, two = b.pick(4, 6), b.pick(4, 5)
    b.line(f"y = {b.linear(width, one)}(x)")
    b.line(f"z = {b.pick('y', f'{b.linear(width, two)}(x)')}")
    inner = one * one if b.lines[-1] == "z = y" else one * two
    product = b.pick(
        "(y[..., :, None] * z[..., None, :]).flatten(2)",
        "torch.einsum('bni,bnj->bnij', y, z).flatten(-2)",
        "(y.unsqueeze(-1) @ z.unsqueeze(-2)).reshape(x.shape[0], x.shape[1], -1)",
        "(y.mT @ z).flatten(1)[:, None].expand(-1, x.shape[1], -1)",
    )
    b.line(f"x = {b.linear(inner, width)}({product})")
    return shape


def library(b: Block, shape: Shape) -> Shape:
    """Layers that torch brings along."""
    _, width = shape
    heads = b.divisor(width, 2, 3, 4)
    hidden = b.pick(8, 12)
    kind = b.pick("attention", "encoder", "prelu", "bilinear", "glu", "sequential", "weight_norm")
    if kind == "attention":
        layer = b.module(f"nn.MultiheadAttention({width}, {heads}, batch_first=True)")
        b.line(f"x = {layer}(x, x, x, need_weights={b.flag()})[0]")
    elif kind == "encoder":
        options = f"batch_first=True, norm_first={b.flag()}, activation='gelu'"
        layer = f"nn.TransformerEncoderLayer({width}, {heads}, {hidden}, {options})"
        b.line(f"x = {b.module(layer)}(x)")
    elif kind == "prelu":
        b.line(f"x = {b.linear(width, hidden)}(x).mT")
        b.line(f"x = {b.linear(hidden, width)}({b.module(f'nn.PReLU({hidden})')}(x).mT)")
    elif kind == "bilinear":
        b.line(f"x = {b.module(f'nn.Bilinear({width}, {width}, {hidden})')}(x, x.flip(1))")
        b.line(f"x = {b.linear(hidden, width)}(x)")
    elif kind == "glu":
        b.line(f"x = {b.module('nn.GLU(dim=-1)')}({b.linear(width, 2 * hidden)}(x))")
        b.line(f"x = {b.linear(hidden, width)}(x)")
    elif kind == "sequential":
        layers = f"nn.Linear({width}, {hidden}), nn.Unflatten(-1, (2, {hidden // 2})), nn.GELU()"
        rest = f"nn.Flatten(-2), nn.LayerNorm({hidden}), nn.Linear({hidden}, {width})"
        b.line(f"x = {b.module(f'nn.Sequential({layers}, {rest})')}(x)")
    else:
        normed = f"torch.nn.utils.parametrizations.weight_norm(nn.Linear({width}, {hidden}))"
        b.line(f"x = {b.linear(hidden, width)}({b.module(normed)}(x))")
    return shape


def loop(b: Block, shape: Shape) -> Shape:
    """As many ops as an attribute says."""
    _, width = shape
    count, part = b.pick(2, 3), b.pick(4, 5)
    size = b.size(part)
    b.line(f"y = {b.linear(width, count * part)}(x)")
    b.line(f"parts = [y[..., i * {size}:(i + 1) * {size}] for i in range({b.size(count)})]")
    way = b.pick("sum", "cat", "layers", "recurrent")
    if way == "layers":
        layers = b.module(f"nn.ModuleList(nn.Linear({part}, {width}) for _ in range({count}))")
        b.line(f"x = sum(layer(part) for layer, part in zip({layers}, parts))")
        return shape
    if way == "recurrent":
        layer = b.linear(part, part)
        b.line("x = parts[0]")
        b.line(f"for part in parts[1:]: x = torch.tanh({layer}(x)) + part")
    else:
        code = "torch.cat(parts[::-1], dim=-1)" if way == "cat" else "sum(parts)"
        b.line(f"x = {code}")
    b.line(f"x = {b.linear(count * part if way == 'cat' else part, width)}(x)")
    return shape


def padded(b: Block, shape: Shape) -> Shape:
    """Channels added as zeros, or left out."""
    tokens, width = shape
    wider = width + b.pick(2, 4)
    b.line(f"y = {b.linear(width, wider)}(x)")
    way = b.pick("pad", "zeros", "cut")
    if way == "pad":
        b.line(f"x = F.pad(x, (0, {b.pick(str(wider - width), 'y.shape[-1] - x.shape[-1]')})) + y")
    elif way == "zeros":
        zeros = f"x.new_zeros(x.shape[0], {b.tokens(tokens)}, {wider - width})"
        b.line(f"x = torch.cat([x, {zeros}], dim=-1) + y")
    else:
        b.line(f"x = y[..., :{b.pick(str(width), 'x.shape[-1]')}] + x")
        return shape
    return tokens, wider


def maxout(b: Block, shape: Shape) -> Shape:
    """The largest of several channels; channels of a bank."""
    _, width = shape
    hidden, pieces = b.pick(6, 8), b.pick(2, 3)
    b.line(f"y = {b.linear(width, hidden * pieces)}(x)")
    code = b.pick(
        f"y.view(*y.shape[:2], {hidden}, {pieces}).amax(-1)",
        f"y.view(*y.shape[:-1], {pieces}, {b.size(hidden)}).max(dim=-2).values",
        f"torch.stack(y.chunk({pieces}, dim=-1)).amax(0)",
        f"y.unflatten(-1, ({pieces}, -1)).softmax(-2).mul(y.unflatten(-1, ({pieces}, -1))).sum(-2)",
    )
    b.line(f"x = {b.linear(hidden, width)}({code})")
    return shape


def merged(b: Block, shape: Shape) -> Shape:
    """Attention with heads laid into the batch, and perhaps mixed afterwards."""
    width = shape[1]
    tokens = b.tokens(shape[0])
    heads, dim = b.pick(2, 3), b.pick(4, 5)
    h = b.size(heads)
    layers = [b.linear(width, heads * dim) for _ in range(3)]
    for name, layer in zip("qkv", layers, strict=True):
        b.line(f"{name} = {layer}(x).view(x.shape[0], {tokens}, {h}, {dim}).transpose(1, 2)")
        b.line(f"{name} = {name}.reshape(x.shape[0] * {h}, {tokens}, {dim})")
    zeros = f"torch.zeros({tokens}, {tokens}, dtype=x.dtype).expand(q.shape[0], -1, -1)"
    b.line(
        b.pick(
            "a = torch.bmm(q, k.transpose(1, 2)) * 0.5",
            f"a = torch.baddbmm({zeros}, q, k.mT, beta=0, alpha=0.5)",
        )
    )
    b.line(f"a = a.view(x.shape[0], {h}, {tokens}, {tokens}).softmax(-1)")
    if b.flag():
        mix = b.module(b.pick(f"nn.Conv2d({heads}, {heads}, 1)", f"nn.Linear({heads}, {heads})"))
        last = "Linear" in b.init[-1]
        b.line(f"a = {mix}(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)" if last else f"a = {mix}(a)")
    b.line("x = torch.bmm(a.flatten(0, 1), v).unflatten(0, (x.shape[0], -1))")
    b.line(f"x = {b.linear(heads * dim, width)}(x.transpose(1, 2).flatten(2))")
    return shape


def rotary(b: Block, shape: Shape) -> Shape:
    """Queries and keys turned by their position, in halves or in pairs, by a table."""
    number, width = shape
    tokens = b.tokens(number)
    heads, dim = b.pick(2, 3), b.pick(4, 8)
    packed = b.linear(width, 3 * heads * dim)
    b.line(f"q, k, v = {packed}(x).view(-1, {tokens}, 3, {heads}, {dim}).permute(2, 0, 3, 1, 4)")
    way = b.pick("halves", "pairs", "computed")
    if way == "computed":
        steps = f"torch.arange({dim // 2}, dtype=x.dtype)"
        b.line(f"t = torch.arange({tokens}, dtype=x.dtype)[:, None] * 0.5 ** {steps}")
        b.line("c, s = torch.cat([t, t], -1).cos(), torch.cat([t, t], -1).sin()")
    else:
        most = MOST_TOKENS if b.flexible else number
        rows = f"[:{tokens}]" if b.flexible else ""
        b.line(f"c, s = {b.buffer(most, dim)}{rows}, {b.buffer(most, dim)}{rows}")
    for name in "qk":
        turned = (
            f"torch.stack([-{name}[..., 1::2], {name}[..., ::2]], dim=-1).flatten(-2)"
            if way == "pairs"
            else f"torch.cat([-{name}[..., {dim // 2}:], {name}[..., :{dim // 2}]], dim=-1)"
        )
        b.line(f"{name} = {name} * c + {turned} * s")
    b.line("x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)")
    b.line(f"x = {b.linear(heads * dim, width)}(x)")
    return shape


def looked_up(b: Block, shape: Shape) -> Shape:
    """Tokens chosen by score, channels by a list; order and running sums."""
    tokens, width = shape
    number = max(tokens // 2, 2)
    few = f"max({b.tokens(tokens)} // 2, 2)" if b.flexible else str(number)
    score = b.pick("x.sum(-1)", "x.square().sum(-1)", f"{b.linear(width, 1)}(x)[..., 0]")
    code = b.pick(
        lambda: (
            f"x.gather(1, {score}.topk({few}, dim=1).indices[..., None].expand(-1, -1, {width}))"
        ),
        lambda: f"x[:, list(range({few}))]",
        lambda: f"x.cumsum(1)[:, :{few}]",
        lambda: f"x[torch.arange(x.shape[0])[:, None], {score}.argsort(1)[:, :{few}]]",
        lambda: f"x.index_select(2, torch.arange({width - 1}, -1, -1))[:, :{few}]",
        lambda: f"x.roll(1, dims={b.pick(1, 2)})[:, :{few}]",
    )
    b.line(f"x = {code()}")
    return number, width


def unruled(b: Block, shape: Shape) -> Shape:
    """Ops that the engine has no rule for: what they touch stays whole, the rest need not."""
    width = shape[1]
    tokens = b.tokens(shape[0])
    hidden = b.pick(8, 12)
    b.line(f"y = {b.linear(width, hidden)}({b.activation(f'{b.linear(width, width)}(x)')})")
    code = b.pick(
        "torch.fft.fft(y, dim=1).real",
        "torch.logcumsumexp(y, dim=1)",
        "torch.cdist(y, y) @ y",
        "torch.diff(y, dim=1, prepend=y[:, :1])",
        "torch.renorm(y, 2, 0, 1.0)",
    )
    b.line(f"y = {code}")
    b.line(f"x = {b.linear(hidden, width)}(y.view(x.shape[0], {tokens}, {hidden}))")
    return shape


def nested(b: Block, shape: Shape) -> Shape:
    """A module of its own that takes two tensors and gives two, by position and by name."""
    _, width = shape
    hidden = b.pick(8, 12)
    layer = b.module("nn.Module()")
    b.init.append(f"{layer}.a = nn.Linear({width}, {2 * hidden})")
    b.init.append(f"{layer}.size = {hidden}")
    b.line(f"y, z = {layer}.a(x).split({layer}.size, dim=-1)")
    b.line(b.pick("y, z = z, y", "y = y * z", "z = z + y.sigmoid()"))
    b.line(f"x = {b.linear(2 * hidden, width)}(torch.cat((y, z), -1))")
    return shape


def norm_of_rows(b: Block, shape: Shape) -> Shape:
    """Batch and tokens laid into one dimension, and taken apart again."""
    width = shape[1]
    tokens = b.tokens(shape[0])
    hidden = b.pick(8, 12)
    b.line(f"y = x.reshape(-1, {b.size(width)})")
    norm = b.pick(
        f"nn.BatchNorm1d({hidden})", f"nn.GroupNorm(2, {hidden})", f"nn.LayerNorm({hidden})"
    )
    b.line(f"y = {b.module(norm)}({b.linear(width, hidden)}(y))")
    last = b.parameter(hidden, width)
    b.line(f"y = {b.pick(f'y @ {last}', f'torch.addmm({b.parameter(width)}, y, {last})')}")
    b.line(f"x = x + y.view({b.pick('-1', 'x.shape[0]')}, {tokens}, {width})")
    return shape
