"""Blocks that depend on the mode, on gradients and on hooks; on (batch, tokens, channels)."""

from __future__ import annotations

from tests.networks.writer import Block, Shape


def _view(b: Block, hidden: int) -> None:
    """A view with stated channels, so that the forward has to be rewritten."""
    if b.flag(0.6):
        b.line(f"y = y.view(y.shape[0], y.shape[1], 2, {hidden // 2}).tanh().flatten(2)")


def gradients(b: Block, shape: Shape) -> Shape:
    """What is shut off from gradients, or let in again."""
    _, width = shape
    hidden = b.pick(8, 12)
    one, two = b.linear(width, hidden), b.linear(width, hidden)
    b.line(f"y = {one}(x)")
    _view(b, hidden)
    way = b.pick("no_grad", "detach", "nested", "set", "method", "buffer", "requires", "checkpoint")
    if way == "no_grad":
        b.line(f"with torch.no_grad(): z = {two}(x).tanh()")
    elif way == "detach":
        b.line(f"z = {two}(x.detach()).detach()")
    elif way == "nested":
        b.line("with torch.no_grad():")
        b.line("    z = x * 0.5")
        b.line(f"    with torch.enable_grad(): z = {two}(z).tanh()")
    elif way == "set":
        b.line(f"with torch.set_grad_enabled({b.flag()}): z = {two}(x)")
    elif way == "method":
        layer = b.module(f"nn.Linear({width}, {hidden}).requires_grad_(False)")
        b.line(f"z = {layer}(x) + {two}(x)")
    elif way == "buffer":
        seen = b.buffer(hidden)
        b.line(f"z = {two}(x)")
        update = f"{seen}.mul_(0.9).add_(z.detach().sum((0, 1)) / z.shape[0], alpha=0.1)"
        b.line(f"if self.training: {update}")
        b.line(f"z = z * {seen}")
    elif way == "requires":
        b.line(f"z = {two}(x)")
        b.line("z = z.sigmoid() if z.requires_grad else z.sigmoid()")
    else:
        call = f"torch.utils.checkpoint.checkpoint({two}, x, use_reentrant=False)"
        b.line(f"z = {call} if self.training else {two}(x)")
    b.line(b.pick("y = y * z", "y = y + z"))
    b.line(f"x = {b.linear(hidden, width)}(y)")
    return shape


def hooked(b: Block, shape: Shape) -> Shape:
    """Hooks that change what goes in or out, that look, or that count."""
    _, width = shape
    hidden = b.pick(8, 12)
    layer = b.linear(width, hidden)
    where = b.pick(layer, layer, "self")
    hook = b.pick(
        "register_forward_hook(lambda m, a, o: o * 0.5)",
        "register_forward_hook(lambda m, a, o: o.tanh() if m.training else o)",
        "register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))",
        "register_forward_hook(lambda m, a, k, o: o * 0.5, with_kwargs=True)",
        "register_full_backward_hook(lambda m, i, o: tuple(g * 0.5 for g in i))",
        "register_forward_hook(lambda m, a, o: setattr(m, 'calls', getattr(m, 'calls', 0) + 1))",
        "register_forward_hook(lambda m, a, o: setattr(m, 'metas', bool(o.is_meta)))",
        "register_forward_pre_hook(lambda m, a: setattr(m, 'calls', getattr(m, 'calls', 0) + 1))",
    )
    b.init.append(f"{where}.{hook}")
    b.line(f"y = {layer}(x)")
    _view(b, hidden)
    b.line(f"x = {b.linear(hidden, width)}({b.activation('y')})")
    return shape


def staged(b: Block, shape: Shape) -> Shape:
    """Layers that only one mode runs, or that run and give nothing."""
    _, width = shape
    hidden = b.pick(8, 12)
    one, two = b.linear(width, hidden), b.linear(hidden, width)
    b.line(f"y = {one}(x)")
    _view(b, hidden)
    b.line(f"y = {b.activation('y')}")
    way = b.pick("training", "either", "unread", "unused", "drop")
    if way == "training":
        b.line(f"if self.training: y = y + {b.linear(hidden, hidden)}(y)")
    elif way == "either":
        layers = b.linear(hidden, hidden), b.linear(hidden, hidden)
        b.line(f"y = {layers[0]}(y) if self.training else {layers[1]}(y)")
    elif way == "unread":
        b.line(f"unread = {b.linear(hidden, 5)}(y)")
    elif way == "unused":
        b.linear(hidden, 5)
        b.parameter(1, 1, width)
    else:
        dropout = b.pick("nn.Dropout(0.0)", "nn.Dropout(0.1)", "nn.Identity()")
        b.line(f"y = {b.module(dropout)}(y)")
        b.line("y = F.dropout(y, 0.0, self.training)")
    b.line(f"x = {two}(y)")
    return shape
