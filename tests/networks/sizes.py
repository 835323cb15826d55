"""Blocks on tokens whose forward computes with the batch and the number of tokens."""

from __future__ import annotations

from tests.networks.writer import MOST_TOKENS, Block, Shape


def arithmetic(b: Block, shape: Shape) -> Shape:
    """Numbers that Python computes from sizes, between two layers."""
    _, width = shape
    hidden = _begin(b, width)
    for _ in range(b.pick(1, 1, 2)):
        b.line(f"y = {_numbers(b, width, hidden)}")
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return shape


def _begin(b: Block, width: int) -> int:
    """B, N and y; often with a view that states the channels, which has to be rewritten."""
    hidden = b.pick(8, 12, 16)
    b.line("B, N = x.shape[0], x.shape[1]")
    b.line(f"y = {b.linear(width, hidden)}(x)")
    if b.flag(0.7):
        parts = b.divisor(hidden, 2, 4)
        view = b.pick(
            f"y.view(B, N, {parts}, {hidden // parts})",
            f"y.reshape(-1, N, {parts}, {hidden // parts})",
            f"y.view(B, -1, {parts}, {hidden // parts})",
            f"y.unflatten(-1, ({parts}, {hidden // parts}))",
        )
        b.line(f"y = {view}.tanh().flatten(2)")
    return hidden


def _numbers(b: Block, width: int, hidden: int) -> str:
    return b.pick(
        lambda: "y + y.sum(1, keepdim=True) / N",
        lambda: "y / B",
        lambda: "y * len(x)",
        lambda: "y * math.log(N + 1)",
        lambda: "y + y[:, N - 1][:, None]",
        lambda: "y * y[:, N - 1 :]",
        lambda: "y * (100 / x.numel())",
        lambda: "y * (1 / math.sqrt(x.shape[-1]))",
        lambda: "y * torch.arange(N, dtype=x.dtype, device=x.device)[:, None]",
        lambda: "y * torch.arange(1, N + 1)[:, None].to(y)",
        lambda: "y * y.sum(-1).topk(max(N // 3, 1), dim=1).values.tanh().sum(1)[:, None, None]",
        lambda: "y * torch.ones(B, dtype=y.dtype).sum()",
        lambda: "torch.einsum('ab,bnc->anc', torch.eye(B, dtype=y.dtype, device=y.device), y)",
        lambda: "(torch.eye(B, dtype=y.dtype) @ y.flatten(1)).view(B, N, -1)",
        lambda: (
            f"F.conv1d(y.mT.reshape(1, -1, N), {b.parameter(hidden, hidden, 1)}.repeat(B, 1, 1),"
            " groups=B).view(B, -1, N).mT"
        ),
        lambda: "y * int(math.sqrt(N))",
        lambda: (
            "(lambda s: torch.cat([y[:, :s * s].unflatten(1, (s, s)).transpose(1, 2).flatten(1, 2),"
            " y[:, s * s:]], 1))(int(math.sqrt(N)))"
        ),
        lambda: "y.view(B * N, -1).tanh().view(-1, N, y.shape[-1])",
        lambda: f"y.reshape(-1, {hidden}).tanh().reshape(B, -1, {hidden})",
        lambda: "torch.cat(y.split([N // 2, N - N // 2], dim=1)[::-1], dim=1)",
        lambda: "torch.stack([y[:, i] * ((i + 1) / N) for i in range(N)], dim=1)",
        lambda: "F.interpolate(y.mT, size=2 * N).mT[:, ::2]",
        lambda: "F.adaptive_avg_pool1d(y.mT, N).mT",
        lambda: "F.adaptive_avg_pool1d(y.mT, max(N // 2, 1)).repeat_interleave(2, 2).mT[:, :1] * y",
        lambda: "y.repeat(1, 2, 1)[:, N // 2 : N // 2 + N]",
        lambda: "y.roll(N // 2, 1)",
        lambda: "y * torch.linspace(0, 1, N, dtype=y.dtype)[:, None]",
        lambda: "F.pad(y, (0, 0, 1, N % 2))[:, :N]",
        lambda: "y * y.new_full((N, 1), 2 / N)",
        lambda: "y * min(N, 7) / max(B, 2)",
        lambda: "y * N ** -0.5",
        lambda: "y - y.sum((0, 1)) / (B * N)",
        lambda: "y * (0.5 if N % 2 else 2.0)",
        lambda: "torch.tril(torch.ones(N, N, dtype=y.dtype)) @ y / N",
        lambda: f"y * {b.parameter(MOST_TOKENS, hidden)}[:N]",
        lambda: f"y * {b.parameter(MOST_TOKENS, 1)}[-N:]",
        lambda: f"y * {b.parameter(1, MOST_TOKENS, hidden)}[:, 1 : N + 1].expand(B, -1, -1)",
        lambda: (
            f"y * F.interpolate({b.parameter(1, hidden, 4)}, size=N, mode='linear',"
            " align_corners=False).mT"
        ),
        lambda: "y.gather(1, torch.arange(N - 1, -1, -1)[None, :, None].expand(B, N, y.shape[-1]))",
        lambda: "y[torch.arange(B)[:, None], torch.arange(N).flip(0)]",
        lambda: "y.as_strided((B, N, y.shape[-1]), y.stride())",
        lambda: "y * torch.eye(N, dtype=y.dtype).sum(0)[:, None]",
        lambda: "F.layer_norm(y, y.shape[2:]) * (N / 8)",
        lambda: "y.masked_fill(torch.arange(N)[:, None] >= N - 1, 0.0)",
        lambda: "torch.cat([y[:, 1:], y.new_zeros(B, 1, y.size(2))], 1) - y / N",
        lambda: "y * torch.zeros(B, N, 1).add(1 / N).to(y.dtype)",
    )()


def on_images(b: Block, shape: Shape) -> Shape:
    """Numbers from the height and width of an image, between two convolutions."""
    width = shape[0]
    hidden = b.pick(8, 12)
    b.line("B, _, H, W = x.shape")
    b.line(f"y = {b.module(f'nn.Conv2d({width}, {hidden}, 1)')}(x)")
    if b.flag(0.7):
        b.line(f"y = y.view(B, 2, {hidden // 2}, H, W).tanh().flatten(1, 2)")
    table = b.parameter(1, hidden, 4, 4)
    grid = f"{table}, size=(H, W), mode='bilinear', align_corners=False"
    code = b.pick(
        "F.pad(y, (0, -W % 4, 0, -H % 4)).tanh()[:, :, :H, :W]",
        "F.interpolate(F.avg_pool2d(y, 2), size=(H, W))",
        f"y * F.interpolate({grid})",
        "y * (y.sum((2, 3), keepdim=True) / (H * W)).tanh()",
        "y * math.log(H * W) / B",
        "y * torch.linspace(-1, 1, W, dtype=y.dtype)",
        "y + y * torch.linspace(-1, 1, H, dtype=y.dtype)[:, None]",
        "y * torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')[0].to(y.dtype)",
        f"y.view(B, {hidden}, H // 2, 2, W // 2, 2).roll(1, 3).reshape(B, {hidden}, H, W)",
        "F.fold(F.unfold(y, 2, stride=2).tanh(), (H, W), 2, stride=2)",
        f"y.view(B, {hidden}, -1).softmax(-1).view(B, -1, H, W)",
        "F.interpolate(F.adaptive_avg_pool2d(y, (H // 2, W)), scale_factor=(2.0, 1.0)) * 0.5",
        "y.roll((H // 2, W // 2), (2, 3))",
        "y * (0.5 if H > W else 2.0)",
        "torch.cat([y[:, :, H // 2 :], y[:, :, : H // 2]], 2)",
        "y.flatten(2)[..., torch.arange(H * W).flip(0)].view(B, -1, H, W)",
        "(y.flatten(2) @ torch.eye(H * W, dtype=y.dtype)).view_as(y)",
    )
    b.line(f"y = {code}")
    b.line(f"x = {b.module(f'nn.Conv2d({hidden}, {width}, 1)')}(y)")
    return shape


def branches(b: Block, shape: Shape) -> Shape:
    """Python that goes another way for another size, type or mode."""
    _, width = shape
    hidden = _begin(b, width)
    condition = b.pick(
        "B > 1",
        "B == 1",
        "N > 6",
        "N % 2 == 0",
        "N < 5 or B > 2",
        "self.training",
        "not self.training",
        "x.dtype == torch.float64",
        "x.dtype in (torch.float16, torch.bfloat16)",
        "torch.is_grad_enabled()",
        "B * N > 12",
    )
    one, two = b.pick(
        lambda: ("y = y * 0.5", "y = y * 2.0"),
        lambda: ("y = y - y.sum(0, keepdim=True) / B", "y = y.tanh()"),
        lambda: (f"y = {b.linear(hidden, hidden)}(y)", "y = F.relu(y)"),
        lambda: ("y = y.roll(1, 1)", f"y = y * {b.parameter(hidden)}"),
        lambda: (f"y = y + {b.linear(width, hidden)}(x)", f"y = y + {b.linear(width, hidden)}(x)"),
        lambda: ("y = y.view(B, N, 2, -1).flip(2).flatten(2)", "y = y.view(B * N, -1).view_as(y)"),
    )()
    b.line(f"if {condition}: {one}")
    if b.flag():
        b.line(f"else: {two}")
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return shape


def sequence_first(b: Block, shape: Shape) -> Shape:
    """Layers whose layout is (tokens, batch, channels)."""
    _, width = shape
    heads = b.divisor(width, 2, 4)
    b.line("x = x.transpose(0, 1)")
    kind = b.pick("attention", "encoder", "by hand", "rows", "decoder")
    if kind == "attention":
        layer = b.module(f"nn.MultiheadAttention({width}, {heads})")
        b.line(f"x = {layer}(x, x, x, need_weights={b.flag()})[0]")
    elif kind == "encoder":
        layer = f"nn.TransformerEncoderLayer({width}, {heads}, 12, activation='gelu')"
        b.line(f"x = {b.module(layer)}(x)")
    elif kind == "decoder":
        b.line(f"x = {b.module(f'nn.TransformerDecoderLayer({width}, {heads}, 12)')}(x, x.flip(0))")
    elif kind == "rows":
        hidden = b.pick(8, 12)
        b.line("N, B, C = x.shape")
        b.line(f"y = {b.linear(width, hidden)}(x.reshape(N * B, C)).tanh().view(N, B, {hidden})")
        b.line(f"x = x + {b.linear(hidden, width)}(y / N)")
    else:
        dim = b.pick(4, 6)
        layers = [b.linear(width, heads * dim) for _ in range(3)]
        b.line("N, B, C = x.shape")
        for name, layer in zip("qkv", layers, strict=True):
            view = f"view(N, B * {b.size(heads)}, {b.size(dim)})"
            b.line(f"{name} = {layer}(x).contiguous().{view}.transpose(0, 1)")
        b.line(f"a = torch.bmm(q * {dim} ** -0.5, k.transpose(1, 2)).softmax(-1)")
        b.line(f"x = torch.bmm(a, v).transpose(0, 1).contiguous().view(N, B, {heads * dim})")
        b.line(f"x = {b.linear(heads * dim, width)}(x)")
    b.line("x = x.transpose(0, 1)")
    return shape
