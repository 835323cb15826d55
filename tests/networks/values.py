"""Blocks on tokens that make tensors: of the input's type, from literals, from sizes."""

from __future__ import annotations

from tests.networks.writer import Block, Shape


def _hidden(b: Block, width: int) -> int:
    hidden = b.pick(8, 12, 16)
    b.line("B, N = x.shape[0], x.shape[1]")
    b.line(f"y = {b.linear(width, hidden)}(x)")
    if b.flag(0.7):
        b.line(f"y = y.view(B, N, 2, {hidden // 2}).tanh().flatten(2)")
    return hidden


def new_tensors(b: Block, shape: Shape) -> Shape:
    """Tensors of the type of another, joined with it or multiplied."""
    _, width = shape
    hidden = _hidden(b, width)
    code = b.pick(
        "y * torch.ones(N, 1, dtype=y.dtype, device=y.device)",
        "y + torch.zeros_like(y)",
        "y * torch.ones_like(y[:, :1])",
        "y * torch.full_like(y[..., :1], 0.5)",
        "y * y.new_ones(1)",
        "y * y.new_tensor(0.5)",
        "torch.cat([y.new_zeros(B, 1, y.shape[-1]), y], 1)[:, :N]",
        "torch.cat([torch.zeros(B, 1, y.shape[-1], dtype=y.dtype), y], 1)[:, 1:]",
        "torch.where(y > 0, y, torch.zeros((), dtype=y.dtype))",
        "torch.where(y > 0, y, torch.zeros_like(y))",
        "torch.arange(N, dtype=x.dtype)[:, None] * y",
        "y * torch.arange(N).type_as(y)[:, None]",
        "torch.maximum(y, torch.zeros_like(y))",
        "y * torch.ones(y.shape[:2], dtype=y.dtype).unsqueeze(-1)",
        "torch.empty_like(y).copy_(y)",
        "torch.zeros(y.shape, dtype=y.dtype).add_(y)",
        "y.float().tanh().to(x.dtype)",
        "y * torch.finfo(y.dtype).eps ** 0",
        "y.new_empty(y.shape).fill_(0.5) * y",
        "y.softmax(1, dtype=torch.float32).to(y.dtype) * y",
    )
    b.line(f"y = {code}")
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return shape


def alibi(b: Block, shape: Shape) -> Shape:
    """Attention with a bias or mask that is computed from the number of tokens."""
    _, width = shape
    heads, dim = b.pick(2, 3, 4), b.pick(4, 6)
    h, d = b.size(heads), b.size(dim)
    b.line("B, N = x.shape[0], x.shape[1]")
    packed = b.linear(width, 3 * heads * dim)
    b.line(f"q, k, v = {packed}(x).view(B, N, 3, {h}, {d}).permute(2, 0, 3, 1, 4)")
    steps = b.pick(
        "torch.arange(N, dtype=x.dtype, device=x.device)",
        "torch.arange(N, device=x.device).to(q.dtype)",
        "torch.linspace(0, N - 1, N, dtype=q.dtype)",
    )
    b.line(f"t = {steps}")
    slopes = b.pick(
        lambda: b.buffer(heads, 1, 1),
        lambda: b.parameter(heads, 1, 1),
        lambda: f"torch.arange(1, {h} + 1, dtype=q.dtype)[:, None, None]",
        lambda: f"x.new_tensor([2.0 ** -i for i in range({heads})]).view(-1, 1, 1)",
        lambda: "0.5",
    )()
    mask = b.pick(
        f"-(t[None] - t[:, None]).abs() * {slopes}",
        f"(t[None] - t[:, None]).clamp(max=0) * {slopes}",
        "torch.zeros(N, N, dtype=q.dtype).masked_fill(t[None] > t[:, None], float('-inf'))",
        "torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)",
        "torch.ones(N, N, dtype=torch.bool).tril()",
    )
    if b.flag() or "bool" in mask:
        b.line(f"x = F.scaled_dot_product_attention(q, k, v, attn_mask={mask})")
    else:
        b.line(f"a = q @ k.transpose(-2, -1) * {dim} ** -0.5 + {mask}")
        soft = b.pick("a.softmax(-1)", "F.softmax(a, -1, dtype=torch.float32).to(q.dtype)")
        b.line(f"x = {soft} @ v")
    b.line(f"x = {b.linear(heads * dim, width)}(x.transpose(1, 2).reshape(B, N, {heads * dim}))")
    return shape


def literals(b: Block, shape: Shape) -> Shape:
    """Numbers written down as tensors, lists as indices, tensors that are plain attributes."""
    tokens, width = shape
    hidden = _hidden(b, width)
    most = 64
    code = b.pick(
        lambda: "y * torch.tensor([0.5], device=y.device).to(y.dtype)",
        lambda: "y * torch.tensor(0.1)",
        lambda: f"y - torch.tensor({[0.0] * hidden}, device=y.device, dtype=y.dtype)",
        lambda: f"y * torch.tensor({[i % 3 for i in range(hidden)]}, dtype=y.dtype)",
        lambda: "y * y.new_tensor(2.0)",
        lambda: "y * torch.as_tensor([1.0, 2.0], device=y.device)[1].to(y.dtype)",
        lambda: "y[:, [1, 0, *range(2, N)]]",
        lambda: "y[:, list(range(N))[::-1]]",
        lambda: "y * torch.tensor([i % 2 for i in range(N)], device=y.device).to(y)[:, None]",
        lambda: "y + y[:, torch.tensor([0, 1])].sum(1, keepdim=True)",
        lambda: "y.index_select(1, torch.tensor(list(range(N)))).mul(torch.tensor(0.5))",
        lambda: f"y * {b.module(f'torch.linspace(0, 1, {most})')}[:N, None].to(y.dtype)",
        lambda: f"y * {b.module('torch.tensor(0.5)')}",
        lambda: f"y[..., {b.module(f'torch.arange({hidden - 1}, -1, -1)')}]",
        lambda: f"y * {b.module(f'torch.linspace(0, 1, {hidden})')}.to(y)",
        lambda: f"({b.module(f'torch.ones({most}, {most}).tril_()')}[:N, :N].to(y.dtype) @ y) / N",
        lambda: "y * torch.from_numpy(np.linspace(0, 1, N))[:, None].to(y.dtype)",
        lambda: "y * [0.5, 1.0, 2.0][N % 3]",
        lambda: "y * torch.tensor([[0.5, 2.0]], dtype=y.dtype).sum()",
    )()
    b.line(f"y = {code}")
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return tokens, width


def held_widths(b: Block, shape: Shape) -> Shape:
    """Widths and other sizes that a tensor holds: these stay when the width shrinks."""
    _, width = shape
    hidden = _hidden(b, width)
    size = b.pick("y.size(-1)", "y.shape[-1]", "y.shape[2]", "x.shape[-1]", "len(y[0, 0])", "N")
    number = b.pick(
        f"torch.tensor({size})",
        f"torch.tensor({size}, dtype=y.dtype)",
        f"torch.tensor(float({size}))",
        f"torch.as_tensor({size})",
        f"torch.full((), {size}, dtype=y.dtype)",
        f"y.new_tensor({size})",
        f"torch.from_numpy(np.array(float({size})))",
        f"torch.ones({size}, dtype=y.dtype).sum()",
        f"{size}",
        f"float({size})",
        f"torch.tensor([1, {size}])[1]",
        f"torch.scalar_tensor({size}, dtype=y.dtype)",
    )
    b.line(f"s = {number}")
    if "torch" not in number and "tensor" not in number:
        b.line("y = y / s ** 0.5")
    else:
        b.line(b.pick("y = y / torch.sqrt(s.to(y.dtype))", "y = y * (s.to(y.dtype) / 16)"))
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return shape
