"""Attention blocks, as many ways of writing them down as people use."""

from __future__ import annotations

from tests.networks.writer import MOST_TOKENS, Block, Shape


def attention(b: Block, shape: Shape) -> Shape:
    """Softmax attention: packed or separate, grouped queries, norms, masks, fused or not."""
    number, width = shape
    tokens = b.tokens(number)
    heads, dim = b.pick(2, 3, 4), b.pick(4, 6, 8)
    groups = b.divisor(heads, 1, 1, 2)
    value_dim = dim if b.flag(0.7) else b.pick(4, 5)
    _project(b, shape, heads, dim, heads // groups, value_dim)
    _norms(b, dim)
    fused = b.flag()
    if groups > 1:
        _share_keys(b, shape, heads, groups, dim, value_dim)
    bias = _bias(b, heads, number)
    _product(b, fused, bias, dim)
    out = b.linear(heads * value_dim, width)
    inner = b.size(heads * value_dim)
    merge = b.pick(
        f"x.transpose(1, 2).reshape(x.shape[0], {tokens}, {inner})",
        "x.transpose(1, 2).flatten(2)",
        f"x.permute(0, 2, 1, 3).contiguous().view(x.shape[0], -1, {inner})",
    )
    b.line(f"x = {out}({merge})")
    return shape


def _project(b: Block, shape: Shape, heads: int, dim: int, kv_heads: int, value_dim: int) -> None:
    number, width = shape
    tokens = b.tokens(number)
    h, d = b.size(heads), b.size(dim)
    if kv_heads == heads and value_dim == dim and b.flag():
        packed = b.linear(width, 3 * heads * dim)
        split = b.pick(
            f".reshape(x.shape[0], {tokens}, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)",
            f".reshape(x.shape[0], {tokens}, 3, {h}, -1).permute(2, 0, 3, 1, 4).unbind(0)",
            f".unflatten(-1, (3, {h}, {d})).permute(2, 0, 3, 1, 4)",
        )
        b.line(f"q, k, v = {packed}(x){split}")
        return
    sizes = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    if b.flag():
        packed = b.linear(width, sum(sizes))
        b.line(f"q, k, v = {packed}(x).split([{', '.join(map(b.size, sizes))}], dim=-1)")
    else:
        layers = [b.linear(width, size) for size in sizes]
        b.line(f"q, k, v = {', '.join(f'{layer}(x)' for layer in layers)}")
    for name, count, part in (("q", heads, dim), ("k", kv_heads, dim), ("v", kv_heads, value_dim)):
        view = b.pick(
            f"view(x.shape[0], {tokens}, {b.size(count)}, {b.size(part)})",
            f"view(x.shape[0], -1, {b.size(count)}, {part})",
            f"unflatten(-1, ({b.size(count)}, {b.size(part)}))",
        )
        b.line(f"{name} = {name}.{view}.transpose(1, 2)")


def _norms(b: Block, dim: int) -> None:
    norm = b.pick(
        "",
        "",
        f"nn.LayerNorm({dim})",
        f"nn.RMSNorm({dim})",
        "F.normalize({}, dim=-1)",
        f"F.layer_norm({{}}, ({dim},))",
    )
    for name in "qk" if norm else "":
        code = norm.format(name) if "{}" in norm else f"{b.module(norm)}({name})"
        b.line(f"{name} = {code}")


def _share_keys(b: Block, shape: Shape, heads: int, groups: int, dim: int, value_dim: int) -> None:
    """Each key and value head serves several query heads."""
    tokens = b.tokens(shape[0])
    way = b.pick("repeat_interleave", "expand")
    for name, last in (("k", dim), ("v", value_dim)):
        if way == "repeat_interleave":
            b.line(f"{name} = {name}.repeat_interleave({groups}, dim=1)")
        else:
            stretched = f"{name}[:, :, None].expand(-1, -1, {groups}, -1, -1)"
            b.line(f"{name} = {stretched}.reshape(x.shape[0], {heads}, {tokens}, {last})")


def _bias(b: Block, heads: int, number: int) -> str | None:
    kind = b.pick("none", "none", "table", "one", "causal")
    tokens = b.tokens(number)
    most = MOST_TOKENS if b.flexible else number
    if kind == "table":
        table = b.parameter(heads, most, most)
        return f"{table}[:, :{tokens}, :{tokens}]" if b.flexible else table
    if kind == "one":
        table = b.parameter(most, most)
        return f"{table}[:{tokens}, :{tokens}]" if b.flexible else table
    if kind == "causal":
        return f"torch.full(({tokens}, {tokens}), -1e4, dtype=x.dtype).triu(1)"
    return None


def _product(b: Block, fused: bool, bias: str | None, dim: int) -> None:
    if fused:
        mask = f", attn_mask={bias}" if bias else ""
        scale = b.pick("", ", scale=0.3")
        b.line(f"x = F.scaled_dot_product_attention(q, k, v{mask}{scale})")
        return
    product = b.pick(
        "q @ k.transpose(-2, -1)",
        "torch.einsum('bhnd,bhmd->bhnm', q, k)",
        "torch.matmul(q, k.mT)",
        "(q[..., :, None, :] * k[..., None, :, :]).sum(-1)",
    )
    scale = b.pick(f"* {dim} ** -0.5", "* q.shape[-1] ** -0.5", "* 0.25")
    b.line(f"a = {product} {scale}")
    if bias:
        b.line(f"a = a + {bias}" if b.flag() else f"a += {bias}")
    if b.flag(0.2) and bias is None:
        b.line("a = a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).triu(1), -1e4)")
    b.line("a = a.softmax(dim=-1)")
    b.line(b.pick("x = a @ v", "x = torch.einsum('bhnm,bhmd->bhnd', a, v)"))


def linear_attention(b: Block, shape: Shape) -> Shape:
    """Keys and values are multiplied first; what the feature map is decides what may be cut."""
    number, width = shape
    tokens = b.tokens(number)
    heads, dim = b.pick(1, 2, 3), b.pick(4, 6)
    layers = [b.linear(width, heads * dim) for _ in range(3)]
    b.line(f"q, k, v = ({', '.join(f'{layer}(x)' for layer in layers)})")
    for name in "qkv":
        b.line(f"{name} = {name}.view(x.shape[0], {tokens}, {b.size(heads)}, {b.size(dim)})")
    feature = b.pick("F.relu({})", "F.elu({}) + 1", "{}.sigmoid()", "{}.square()", "{}")
    b.line(f"q, k = {feature.format('q')}, {feature.format('k')}")
    if b.flag():
        b.line("q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)")
        b.line("x = (q @ (k.transpose(-2, -1) @ v)).transpose(1, 2)")
    else:
        b.line("s = torch.einsum('bnhd,bnhe->bhde', k, v)")
        b.line("x = torch.einsum('bnhd,bhde->bnhe', q, s)")
    if b.flag():
        b.line("x = x / (1e-3 + (x * x).sum(-1, keepdim=True)).sqrt()")
    out = b.linear(heads * dim, width)
    b.line(f"x = {out}(x.reshape(x.shape[0], {tokens}, -1))")
    return shape


def channel_attention(b: Block, shape: Shape) -> Shape:
    """Attention between channels (XCiT): the softmax runs over head dims."""
    _, width = shape
    heads, dim = b.pick(2, 3), b.pick(4, 6)
    packed = b.linear(width, 3 * heads * dim)
    b.line(f"q, k, v = {packed}(x).unflatten(-1, (3, {heads}, {dim})).permute(2, 0, 3, 4, 1)")
    b.line("q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)")
    b.line(f"a = (q @ k.transpose(-2, -1)) * {b.parameter(heads, 1, 1)}")
    b.line("x = (a.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)")
    b.line(f"x = {b.linear(heads * dim, width)}(x)")
    return shape
