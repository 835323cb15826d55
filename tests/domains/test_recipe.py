import pytest

from depgraph import DepgraphError
from domains import FinetuneSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("weight_decay", -1.0),
        ("warmup_epochs", 99),
        ("layer_decay", 0.0),
        ("clip_grad", 0.0),
        ("smoothing", 1.0),
        ("mixup", -0.1),
        ("cutmix", -0.1),
        ("sampling", "some"),
        ("ema_decay", 1.0),
        ("distill_weight", 1.5),
        ("distill_temperature", 0.0),
        ("crop_scale", (0.5, 2.0)),
        ("num_workers", -1),
    ],
)
def test_a_setting_that_cannot_train_is_named_with_what_is_allowed(name, value):
    with pytest.raises(DepgraphError, match=f"{name} is .* it must be"):
        FinetuneSettings(**{name: value})


def test_mixup_with_an_odd_batch_is_refused():
    with pytest.raises(DepgraphError, match="odd"):
        FinetuneSettings(mixup=0.2, batch_size=31)
