"""A linear head on feature maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.evaluation.dense import head
from vicreg_hf.evaluation.dense.head import (
    FeatureMaps,
    LinearHead,
    PixelSample,
    enlarge_at,
    product_at,
    train_head,
)
from vicreg_hf.metrics.segmentation import VOID

SIZE, PIXELS = (3, 4), (12, 20)


def centres() -> torch.Tensor:
    """(240, 2) centres of all pixels, as fractions of height and width."""
    rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in PIXELS), indexing="ij")
    places = torch.stack([rows, columns], 2).flatten(0, 1)
    return (places + 0.5) / torch.tensor(PIXELS)


def scenes(images: int = 24) -> tuple[FeatureMaps, PixelSample]:
    """Maps whose first feature says which of two classes a cell has, a third of it noise."""
    random = torch.Generator().manual_seed(0)
    cells = torch.randint(2, (images, *SIZE), generator=random)
    noise = torch.randn(images, 12, 6, generator=random)
    noise[..., 0] = noise[..., 0] / 3 + 2.0 * cells.flatten(1)
    classes = cells.repeat_interleave(4, 1).repeat_interleave(5, 2).flatten(1)
    classes[:, :7] = VOID
    places = centres().float().expand(images, -1, -1)
    return FeatureMaps(noise.flatten(1).half(), SIZE), PixelSample(places, classes)


@pytest.mark.parametrize("enlarge", [enlarge_at, product_at])
def test_values_between_positions_are_those_of_interpolate(enlarge: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0)).double()
    found = enlarge(x, centres().expand(2, -1, -1), SIZE)
    large = F.interpolate(
        x.transpose(1, 2).unflatten(2, SIZE), PIXELS, mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(found, large.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_classes_are_those_of_the_largest_logits_however_many_are_enlarged_together(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "VALUES_AT_ONCE", at_once * PIXELS[0] * PIXELS[1])
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(12, 6, generator=random), torch.randn(6, 5, generator=random)
    weight[:, 4] = weight[:, 1]  # of equal classes the first is taken
    found = LinearHead(weight, torch.zeros(5), torch.zeros(6), torch.ones(6))
    logits = enlarge_at(found.logits(x[None]).double(), centres()[None], SIZE)[0, :, :4]
    assert torch.equal(found.predict(x, SIZE, PIXELS).flatten(), logits.argmax(1))


def test_a_head_learns_what_the_maps_say_and_is_the_same_in_each_run() -> None:
    maps, pixels = scenes()
    found = train_head(maps, pixels, 2, learning_rates=(0.03, 0.1), epochs=10, seed=3)
    assert found.validation.keys() == {0.03, 0.1}
    x = maps.rows(torch.tensor([5]), torch.device("cpu"))[0]
    predicted = found.head.predict(x, SIZE, PIXELS).flatten()
    known = pixels.classes[5] != VOID
    assert (predicted == pixels.classes[5])[known].float().mean() > 0.75  # edges lie between cells
    again = train_head(maps, pixels, 2, learning_rates=(0.03, 0.1), epochs=10, seed=3)
    assert torch.equal(found.head.weight, again.head.weight)
    one = train_head(maps, pixels, 2, learning_rates=(found.learning_rate,), epochs=10, seed=3)
    assert torch.equal(found.head.weight, one.head.weight)  # then it learns from all images
    other = train_head(maps, pixels, 2, learning_rates=(found.learning_rate,), epochs=10, seed=4)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_a_learning_rate_that_diverges_is_not_chosen() -> None:
    maps, pixels = scenes()
    found = train_head(maps, pixels, 2, learning_rates=(1e38, 0.1), epochs=2)
    assert found.learning_rate == 0.1
    with pytest.raises(FloatingPointError, match="smaller --lr_head"):
        train_head(maps, pixels, 2, learning_rates=(1e38,), epochs=2)
