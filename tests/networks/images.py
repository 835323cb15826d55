"""Blocks that take (batch, channels, height, width)."""

from __future__ import annotations

from tests.networks.writer import Block, Shape


def convolution(b: Block, shape: Shape) -> Shape:
    """Plain, grouped, depthwise or pointwise, perhaps followed by norm and nonlinearity."""
    width, high, wide = shape
    kind = b.pick("plain", "grouped", "depthwise", "pointwise", "transposed")
    outer = width if kind == "depthwise" else b.pick(width, b.width())
    groups = b.divisor(outer, 2, 4) if kind == "grouped" else 1
    groups = groups if width % groups == 0 else 1
    groups = width if kind == "depthwise" else groups
    bias = f"bias={b.flag()}"
    if kind == "transposed":
        groups = b.pick(1, 1, 2) if outer % 2 == width % 2 == 0 else 1
        layer = f"nn.ConvTranspose2d({width}, {outer}, 2, 2, groups={groups}, {bias})"
        high, wide = 2 * high, 2 * wide
    elif kind == "pointwise":
        layer = f"nn.Conv2d({width}, {outer}, 1, {bias})"
    else:
        layer = f"nn.Conv2d({width}, {outer}, 3, padding=1, groups={groups}, {bias})"
    b.line(f"x = {b.module(layer)}(x)")
    if b.flag():
        b.line(f"x = {_norm(b, outer)}")
    b.line(f"x = {b.activation('x')}")
    return _smaller(b, (outer, high, wide))


def _smaller(b: Block, shape: Shape) -> Shape:
    width, high, wide = shape
    if max(high, wide) < 8:
        return shape
    pool = b.pick("F.avg_pool2d(x, 2)", "F.max_pool2d(x, 2)", "x[:, :, ::2, 1::2]")
    b.line(f"x = {pool}")
    if pool.startswith("x["):
        return width, (high + 1) // 2, wide // 2
    return width, high // 2, wide // 2


def _norm(b: Block, width: int) -> str:
    groups = b.divisor(width, 1, 2, 4, width)
    layer = b.pick(
        f"nn.BatchNorm2d({width})",
        f"nn.BatchNorm2d({width}, affine=False)",
        f"nn.GroupNorm({groups}, {width})",
        f"nn.InstanceNorm2d({width}, affine=True)",
        f"nn.LayerNorm({width})",
        "functional",
    )
    if layer == "functional":
        return f"F.group_norm(x, {b.size(groups)})"
    if "LayerNorm" in layer:
        return f"{b.module(layer)}(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    return f"{b.module(layer)}(x)"


def norm(b: Block, shape: Shape) -> Shape:
    """Any norm over channels."""
    b.line(f"x = {_norm(b, shape[0])}")
    return shape


def excite(b: Block, shape: Shape) -> Shape:
    """Squeeze and excitation."""
    width = shape[0]
    hidden = b.pick(8, 12)
    way = b.pick("conv", "linear")
    if way == "conv":
        one = b.module(f"nn.Conv2d({width}, {hidden}, 1)")
        two = b.module(f"nn.Conv2d({hidden}, {width}, 1)")
        pooled = b.pick("F.adaptive_avg_pool2d(x, 1)", "x.mean((2, 3), keepdim=True)")
        b.line(f"g = {one}({pooled})")
        b.line(f"g = {two}({b.activation('g')})")
    else:
        b.line(f"g = {b.linear(width, hidden)}(x.mean((2, 3)))")
        b.line(f"g = {b.linear(hidden, width)}({b.activation('g')})")
        grown = b.pick(f"view(-1, {width}, 1, 1)", "unsqueeze(-1).unsqueeze(-1)")
        b.line(f"g = g.{grown}")
    b.line(b.pick("x = x * g.sigmoid()", "x = x.mul_(g.sigmoid())"))
    return shape


def inverted(b: Block, shape: Shape) -> Shape:
    """Expansion, depthwise convolution, projection."""
    width = shape[0]
    hidden = b.pick(16, 24)
    for i, o, kernel, groups in ((width, hidden, 1, 1), (hidden, hidden, 3, hidden)):
        layer = b.module(f"nn.Conv2d({i}, {o}, {kernel}, padding={kernel // 2}, groups={groups})")
        b.line(f"x = {layer}(x)")
        b.line(f"x = {b.activation(_norm(b, o))}" if b.flag() else f"x = {b.activation('x')}")
    b.line(f"x = {b.module(f'nn.Conv2d({hidden}, {width}, 1)')}(x)")
    return shape


def shuffle(b: Block, shape: Shape) -> Shape:
    """Channels dealt out anew between groups, then a convolution."""
    width, high, wide = shape
    groups = b.divisor(width, 2, 4)
    rows, columns = b.positions(high, wide)
    code = b.pick(
        f"x.view(x.shape[0], {groups}, {width // groups}, {rows}, {columns}).transpose(1, 2)"
        ".flatten(1, 2)",
        f"F.channel_shuffle(x, {groups})",
        f"x.reshape(-1, {b.size(groups)}, {width // groups}, {rows}, {columns}).transpose(2, 1)"
        ".reshape(x.shape)",
    )
    b.line(f"x = {b.module(f'nn.Conv2d({width}, {width}, 1, groups={groups})')}(x)")
    b.line(f"x = {code}")
    b.line(f"x = {b.module(f'nn.Conv2d({width}, {width}, 1, groups={b.pick(1, groups)})')}(x)")
    return shape


def joined(b: Block, shape: Shape) -> Shape:
    """Branches joined along channels; dense growth; a part left as it is."""
    width, high, wide = shape
    outer = b.width()
    way = b.pick("dense", "tower", "half", "multiply")
    conv = f"nn.Conv2d({width}, {outer}, 3, padding=1)"
    if way == "dense":
        b.line(f"x = torch.cat([x, F.relu({b.module(conv)}(x))], dim=1)")
        outer += width
    elif way == "tower":
        layers = [b.module(conv), b.module(f"nn.Conv2d({width}, 8, 1)")]
        b.line(f"x = torch.cat(({layers[0]}(x), {layers[1]}(F.max_pool2d(x, 3, 1, 1))), 1)")
        outer += 8
    elif way == "half":
        half = width // 2
        layer = b.module(f"nn.Conv2d({half}, {half}, 3, padding=1, groups={b.pick(1, half)})")
        b.line(f"y, z = {b.pick('x.chunk(2, dim=1)', f'x.split({half}, dim=1)')}")
        b.line(f"x = torch.cat((y, {layer}(z)), dim=1)")
        outer = width // 2 * 2
    else:
        b.line(f"x = {b.module(conv)}(x) * {b.module(conv)}(x).sigmoid()")
    return outer, high, wide


def resample(b: Block, shape: Shape) -> Shape:
    """Positions made out of channels or the reverse, or resampled."""
    width, high, wide = shape
    ways = ["pool"]
    if width % 4 == 0 and high < 8:
        ways.append("shuffle")
    if high % 2 == 0 and wide % 2 == 0:
        ways += ["unshuffle", "patches"]
    if high < 8:
        ways.append("upsample")
    way = b.pick(*ways)
    if way == "shuffle":
        b.line("x = F.pixel_shuffle(x, 2)")
        return width // 4, 2 * high, 2 * wide
    if way == "upsample":
        mode = b.pick("mode='nearest'", "mode='bilinear', align_corners=False")
        b.line(f"x = F.interpolate(x, scale_factor=2, {mode})")
        return width, 2 * high, 2 * wide
    if way == "pool":
        b.line(b.pick("x = F.avg_pool2d(x, 3, 1, 1)", "x = F.adaptive_avg_pool2d(x, 2)"))
        return shape if "avg_pool2d(x, 3" in b.lines[-1] else (width, 2, 2)
    if way == "unshuffle":
        b.line("x = F.pixel_unshuffle(x, 2)")
    else:
        rows, columns = b.positions(high, wide)
        b.line(f"x = x.view(-1, {width}, {rows} // 2, 2, {columns} // 2, 2)")
        b.line("x = x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)")
    conv = b.module(f"nn.Conv2d({4 * width}, {width}, 1)")
    b.line(f"x = {conv}(x)")
    return width, high // 2, wide // 2


def windows(b: Block, shape: Shape) -> Shape:
    """A perceptron within windows, after a partition and before its reverse."""
    width, high, wide = shape
    rows, columns = b.divisor(high, 2), b.divisor(wide, 2)
    whole = b.positions(high, wide)
    h, w = f"{whole[0]} // {rows}", f"{whole[1]} // {columns}"
    hidden = b.pick(8, 12)
    one, two = b.linear(width, hidden), b.linear(hidden, width)
    b.line(f"x = x.permute(0, 2, 3, 1).view(-1, {h}, {rows}, {w}, {columns}, {b.size(width)})")
    b.line(f"x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, {rows * columns}, {width})")
    b.line(f"x = {two}({b.activation(f'{one}(x)')})")
    b.line(f"x = x.view(-1, {h}, {w}, {rows}, {columns}, {width}).permute(0, 5, 1, 3, 2, 4)")
    b.line(f"x = x.reshape(-1, {b.size(width)}, {whole[0]}, {whole[1]})")
    return shape


def table(b: Block, shape: Shape) -> Shape:
    """Parameters and buffers along channels or positions."""
    width, high, wide = shape
    make = b.pick(b.parameter, b.buffer)
    rows, columns = b.positions(high, wide)
    size = (32, 32) if b.flexible else (high, wide)
    part = f"[..., :{rows}, :{columns}]" if b.flexible else ""
    code = b.pick(
        lambda: f"x * {make(width, 1, 1)}",
        lambda: f"x + {make(1, width, *size)}{part}",
        lambda: f"x.mul({make(width)}[:, None, None])",
        lambda: f"x + {make(*size)}{part}",
        lambda: f"x * {make(width)}.view(1, -1, 1, 1) + {make(width)}.view(1, {width}, 1, 1)",
    )
    b.line(f"x = {code()}")
    return shape


def to_tokens(b: Block, shape: Shape) -> Shape:
    """Positions as tokens."""
    width, high, wide = shape
    number = "{} * {}".format(*b.positions(high, wide)) if b.flexible else str(high * wide)
    code = b.pick(
        "x.flatten(2).transpose(1, 2)",
        f"x.permute(0, 2, 3, 1).reshape(x.shape[0], {number}, {width})",
        f"x.reshape(x.shape[0], {b.size(width)}, {number}).mT",
    )
    b.line(f"x = {code}")
    return high * wide, width
