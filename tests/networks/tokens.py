"""Blocks that take (batch, tokens, channels)."""

from __future__ import annotations

from tests.networks.writer import MOST_TOKENS, Block, Shape


def linear(b: Block, shape: Shape) -> Shape:
    """A change of width, by a layer or by a bare parameter."""
    tokens, width = shape
    outer = b.width()
    way = b.pick("layer", "matmul", "functional", "einsum")
    if way == "layer":
        b.line(f"x = {b.linear(width, outer)}(x)")
    elif way == "matmul":
        b.line(f"x = x @ {b.parameter(width, outer)} + {b.parameter(outer)}")
    elif way == "functional":
        b.line(f"x = F.linear(x, {b.parameter(outer, width)})")
    else:
        b.line(f"x = torch.einsum('bnc,cd->bnd', x, {b.parameter(width, outer)})")
    return tokens, outer


def mlp(b: Block, shape: Shape) -> Shape:
    """Two layers around a nonlinearity, perhaps a norm, perhaps tied weights."""
    _, width = shape
    hidden = b.width()
    first = b.linear(width, hidden)
    b.line(f"x = {first}(x)")
    b.line(f"x = {b.activation('x')}")
    if b.flag(0.3):
        norm = b.pick(f"nn.LayerNorm({hidden})", f"nn.RMSNorm({hidden})", "nn.Dropout(0.1)")
        b.line(f"x = {b.module(norm)}(x)")
    if b.flag(0.2):
        b.line(f"x = F.linear(x, {first}.weight.t())")
    else:
        b.line(f"x = {b.linear(hidden, width)}(x)")
    return shape


def gated(b: Block, shape: Shape) -> Shape:
    """GLU, GEGLU, SwiGLU: packed or not."""
    _, width = shape
    hidden = b.pick(8, 12, 16)
    gate = b.pick("F.silu({})", "F.gelu({})", "{}.sigmoid()")
    if b.flag():
        b.line(f"g, x = {b.linear(width, hidden)}(x), {b.linear(width, hidden)}(x)")
    else:
        packed = b.linear(width, 2 * hidden)
        half = b.size(hidden)
        parts = b.pick(
            f"{packed}(x).chunk(2, dim=-1)",
            f"{packed}(x).split({half}, dim=-1)",
            f"{packed}(x).unflatten(-1, (2, {half})).unbind(-2)",
            f"(lambda y: (y[..., :{hidden}], y[..., {hidden}:]))({packed}(x))",
        )
        b.line(f"g, x = {parts}")
    b.line(f"x = {gate.format('g')} * x")
    b.line(f"x = {b.linear(hidden, width)}(x)")
    return shape


def norm(b: Block, shape: Shape) -> Shape:
    """Any norm over channels, as a module, a function or written out."""
    tokens, width = shape
    groups = b.divisor(width, 2, 4)
    code = b.pick(
        lambda: f"{b.module(f'nn.LayerNorm({width})')}(x)",
        lambda: f"{b.module(f'nn.LayerNorm({width}, elementwise_affine=False)')}(x)",
        lambda: f"{b.module(f'nn.LayerNorm({width}, bias=False)')}(x)",
        lambda: f"{b.module(f'nn.RMSNorm({width})')}(x)",
        lambda: f"F.rms_norm(x, ({b.size(width)},), {b.parameter(width)})",
        lambda: f"F.layer_norm(x, (x.shape[-1],), {b.parameter(width)})",
        lambda: f"{b.module(f'nn.BatchNorm1d({width})')}(x.transpose(1, 2)).transpose(1, 2)",
        lambda: f"{b.module(f'nn.GroupNorm({groups}, {width})')}(x.mT).mT",
        lambda: f"F.normalize(x, dim=-1) * {b.parameter(width)}",
        lambda: "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)",
        lambda: (
            "(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()"
        ),
        lambda: f"{b.module(f'nn.LayerNorm([{tokens}, {width}])')}(x)",
    )
    b.line(f"x = {code()}")
    return shape


def squeeze(b: Block, shape: Shape) -> Shape:
    """Channels gated by a summary of the tokens."""
    _, width = shape
    hidden = b.pick(8, 12)
    summary = b.pick("x.mean(1)", "x.sum(1)", "x.amax(1)", "x[:, 0]")
    b.line(f"g = {b.linear(width, hidden)}({summary})")
    b.line(f"g = {b.linear(hidden, width)}({b.activation('g')})")
    gate = b.pick("g.sigmoid()", "F.hardsigmoid(g)", "torch.exp(-g.square())")
    b.line(f"x = x * {gate}[:, None]")
    return shape


def mixer(b: Block, shape: Shape) -> Shape:
    """A perceptron over tokens."""
    tokens, _ = shape
    hidden = b.pick(8, 12)
    b.line(f"y = {b.linear(tokens, hidden)}({b.pick('x.transpose(1, 2)', 'x.permute(0, 2, 1)')})")
    b.line(f"y = {b.activation('y')}")
    b.line(f"x = x + {b.linear(hidden, tokens)}(y).transpose(1, 2)")
    return shape


def convolution(b: Block, shape: Shape) -> Shape:
    """A convolution over tokens: plain, grouped or depthwise."""
    tokens, width = shape
    outer = b.pick(width, b.width())
    groups = b.pick(1, width if outer % width == 0 else 1, b.divisor(width, 2, 4))
    groups = groups if outer % groups == 0 else 1
    layer = b.module(f"nn.Conv1d({width}, {outer}, 3, padding=1, groups={groups})")
    b.line(f"x = {layer}(x.transpose(1, 2)).transpose(1, 2)")
    return tokens, outer


def shuffle(b: Block, shape: Shape) -> Shape:
    """A view that deals channels out anew."""
    width = shape[1]
    tokens = b.tokens(shape[0])
    groups = b.divisor(width, 2, 3, 4)
    rest = width // groups
    first = b.size(groups)
    b.line(f"x = {b.linear(width, width)}(x)")
    code = b.pick(
        f"x.view(x.shape[0], {tokens}, {first}, {rest}).transpose(2, 3).flatten(2)",
        f"x.reshape(x.shape[0], {tokens}, {first}, -1).sum(2)",
        f"x.unflatten(-1, ({first}, {rest})).mul({b.parameter(groups, 1)}).flatten(-2)",
        f"x.view(x.shape[0], {tokens}, {rest}, {groups}).permute(0, 1, 3, 2).reshape(x.shape)",
    )
    b.line(f"x = {code}")
    inner = rest if ".sum(2)" in code else width
    b.line(f"x = {b.linear(inner, width)}(x)")
    return shape


def joined(b: Block, shape: Shape) -> Shape:
    """Branches laid end to end, or added up as a stack."""
    tokens, width = shape
    one, two = b.width(), b.width()
    way = b.pick("cat", "dense", "stack", "cat_norm")
    if way == "stack":
        b.line(f"y = torch.stack([{b.linear(width, one)}(x), {b.linear(width, one)}(x)], dim=2)")
        b.line(b.pick("x = y.sum(2)", "x = y[:, :, 0] * y[:, :, 1].sigmoid()", "x = y.flatten(2)"))
        inner = 2 * one if b.lines[-1] == "x = y.flatten(2)" else one
    elif way == "dense":
        b.line(f"x = torch.cat([x, F.relu({b.linear(width, one)}(x))], dim=-1)")
        inner = width + one
    else:
        b.line(f"x = torch.cat(({b.linear(width, one)}(x), {b.linear(width, two)}(x)), dim=2)")
        inner = one + two
    if way == "cat_norm":
        b.line(f"x = {b.module(f'nn.LayerNorm({inner})')}(x)")
    b.line(f"x = {b.linear(inner, width)}(x)")
    return tokens, width


def parted(b: Block, shape: Shape) -> Shape:
    """Parts of a dimension that go their own ways, perhaps to be joined again."""
    _, width = shape
    hidden = b.pick(12, 16, 24)
    cut = b.pick(hidden // 2, hidden // 4, 5)
    b.line(f"x = {b.linear(width, hidden)}(x)")
    parts = b.pick(
        f"x.split([{b.size(cut)}, {b.size(hidden - cut)}], dim=-1)",
        f"(x[..., :{cut}], x[..., {cut}:])",
        f"(x.narrow(-1, 0, {cut}), x.narrow(2, {b.size(cut)}, {hidden - cut}))",
        f"torch.tensor_split(x, [{cut}], dim=-1)",
    )
    b.line(f"y, z = {parts}")
    # torch does not let one of several views be changed in place
    b.line(f"y = {b.activation('(0.5 * y)')}" if b.flag() else f"y = {b.linear(cut, cut)}(y)")
    if b.flag():
        b.line(f"x = {b.linear(hidden, width)}(torch.cat([{b.pick('y, z', 'z, y')}], dim=-1))")
    else:
        b.line(f"x = {b.linear(cut, width)}(y) + {b.linear(hidden - cut, width)}(z)")
    return shape


def table(b: Block, shape: Shape) -> Shape:
    """Parameters and buffers that lie along channels or tokens."""
    number, width = shape
    tokens = b.tokens(number)
    most = MOST_TOKENS if b.flexible else number + 2
    make = b.pick(b.parameter, b.buffer)
    code = b.pick(
        lambda: f"x * {make(width)}",
        lambda: f"x + {make(most, width)}[:{tokens}]",
        lambda: f"x + {make(1, most, width)}[:, :{tokens}]",
        lambda: f"torch.addcmul(x, x, {make(width)})",
        lambda: f"x * ({make(width)} + 1) + {make(width)}",
        lambda: f"torch.lerp(x, {make(width)}.expand_as(x), 0.25)",
        lambda: f"torch.cat([{make(1, 1, width)}.expand(x.shape[0], -1, -1), x], 1)[:, 1:]",
        lambda: f"torch.where({make(width)} > 0, x, 0.5 * x)",
        lambda: f"x + {make(most + 1, width)}[torch.arange({tokens})]",
        lambda: f"x + torch.ones({width}, dtype=x.dtype)",
        lambda: f"x * {make(2, width // 2)}.flatten()",
    )
    b.line(f"x = {code()}")
    return shape


def sums(b: Block, shape: Shape) -> Shape:
    """Sums over channels of activations: exact only where what is summed vanishes."""
    tokens, width = shape
    hidden = b.pick(8, 12)
    b.line(f"y, z = {b.linear(width, hidden)}(x), {b.linear(width, hidden)}(x)")
    b.line(f"y = {b.pick('y', 'F.relu(y)', 'y.sigmoid()', 'torch.cos(y)', 'y + 1', 'y * z')}")
    total = b.pick(
        "y.sum(-1, keepdim=True)",
        "(y * z).sum(-1, keepdim=True)",
        "torch.linalg.vector_norm(y, dim=-1, keepdim=True)",
        "torch.einsum('bnc,bnc->bn', y, z)[..., None]",
        "torch.bmm(y, z.mT).mean(-1, keepdim=True)",
        "torch.einsum('bnc,bmc->bnm', y, z).tanh().sum(-1, keepdim=True)",
        "(y / (1 + z.square())).sum(-1, keepdim=True)",
        "torch.baddbmm(y.mT @ z, y.mT, z).sum((1, 2), keepdim=True)",
    )
    b.line(f"x = x * torch.tanh({total})")
    return tokens, width


def in_place(b: Block, shape: Shape) -> Shape:
    """Ops that write to their operand, and through views of it."""
    _, width = shape
    hidden = b.width()
    b.line(f"y = {b.linear(width, hidden)}(x)")
    for code in b.random.sample(
        [
            "y.mul_(0.5)",
            "y += 0.1",
            "F.relu(y, inplace=True)",
            "y[:, 0] += 1.0",
            "y[:, 1:].mul_(y[:, :1].sigmoid())",
            f"y.add_({b.parameter(hidden)})",
            "y.view(y.shape[0], -1).tanh_()",
            "y[:, :2] = 0.5",
        ],
        2,
    ):
        b.line(code)
    b.line(f"x = {b.linear(hidden, width)}({b.pick('y', 'y * (y * y).sum(-1, keepdim=True)')})")
    return shape


def tied(b: Block, shape: Shape) -> Shape:
    """Layers that share a weight, or one layer called twice."""
    _, width = shape
    hidden = b.width()
    one, two = b.linear(width, hidden), b.linear(width, hidden)
    if b.flag():
        b.init.append(f"{one}.weight = {two}.weight")
        b.line(f"x = {one}(x) * {two}(x).sigmoid()")
    else:
        b.line(f"x = F.relu({one}(x)) + {one}(x.flip(1)) * {two}(x)")
    if b.flag() and width == hidden:
        b.line(f"x = {one}(x)")
    b.line(f"x = {b.linear(hidden, width)}(x)")
    return shape


def shorter(b: Block, shape: Shape) -> Shape:
    """Fewer tokens, perhaps more channels."""
    tokens, width = shape
    if tokens % 2 == 0 and tokens > 4 and b.flag():
        half = f"{b.tokens(tokens)} // 2"
        b.line(f"x = x.reshape(x.shape[0], {half}, {2 * width})")
        b.line(f"x = {b.linear(2 * width, width)}(x)")
        return tokens // 2, width
    if tokens > 4:
        narrow = f"x = x.narrow(1, 0, {b.tokens(tokens)} - 1)"
        b.line(b.pick("x = x[:, 1:]", "x = x[:, :-1]", narrow))
        return tokens - 1, width
    b.line(f"x = torch.cat([{b.parameter(1, 2, width)}.expand(x.shape[0], 2, -1), x], dim=1)")
    return tokens + 2, width


def to_image(b: Block, shape: Shape) -> Shape:
    """Tokens laid out as an image."""
    tokens, width = shape
    high = b.divisor(tokens, 2, 3, 4)
    rows = b.size(high)
    columns = f"{b.tokens(tokens)} // {high}" if b.flexible else str(tokens // high)
    code = b.pick(
        f"x.transpose(1, 2).reshape(x.shape[0], {b.size(width)}, {rows}, {columns})",
        f"x.transpose(1, 2).unflatten(2, ({rows}, {columns}))",
        f"x.view(x.shape[0], {rows}, {columns}, {width}).permute(0, 3, 1, 2)",
    )
    b.line(f"x = {code}")
    return width, high, tokens // high
