"""The local loss against its definition in plain loops, and by hand for a map of 2 x 2 cells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from authors_loss import DEFAULTS, authors_loss, gradients
from gloo import GlooPool
from largest_output import LargestOutput
from torch import Tensor

from vicreg_hf import local_loss
from vicreg_hf.loss import covariance, local
from vicreg_hf.runtime.distributed import rank, world_size

Point = tuple[float, ...]


def centres(place: list[float], rows: int, columns: int) -> list[Point]:
    """Where the cells of a view lie in its image, row by row."""
    top, left, height, width, mirrored = place
    found = []
    for i, j in itertools.product(range(rows), range(columns)):
        column = columns - 1 - j if mirrored else j
        found.append((top + height * (i + 0.5) / rows, left + width * (column + 0.5) / columns))
    return found


def best_pairs(own: list[Point], other: list[Point], matches: int) -> list[tuple[int, int]]:
    """Each point's nearest one of the others; of these pairs the closest, the closest first."""
    pairs = []
    for p, point in enumerate(own):
        distances = [math.dist(point, each) for each in other]
        q = min(range(len(other)), key=distances.__getitem__)
        pairs.append((distances[q], p, q))
    pairs.sort(key=lambda pair: pair[:2])
    return [(p, q) for _, p, q in pairs[:matches]]


def defined_loss(
    z: Tensor, z_prime: Tensor, places: Tensor, places_prime: Tensor, *, matches: int,
    **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Location and feature parts, image by image and pair by pair; autograd differentiates them."""
    maps, boxes = (z, z_prime), (places.tolist(), places_prime.tolist())
    parts = []
    for kind, source in itertools.product(("location", "feature"), (0, 1)):
        first, second = maps[source], maps[1 - source]
        pairs = []
        for image in range(len(z)):
            if kind == "location":
                points = [centres(boxes[view][image], *maps[view].shape[1:3]) for view in (0, 1)]
            else:
                points = [[tuple(cell) for cell in each[image].flatten(0, 1).tolist()]
                          for each in maps]  # fmt: skip
            pairs.append(best_pairs(points[source], points[1 - source], matches))
        values = []
        for nth in zip(*pairs, strict=True):  # the n-th best pair of every image
            a, b = (
                torch.stack([each[image].flatten(0, 1)[pair[side]]
                             for image, pair in enumerate(nth)])
                for side, each in enumerate((first, second))
            )  # fmt: skip
            values.append(authors_loss(a, b, **settings).loss)
        parts.append(torch.stack(values).mean())
    return parts[0] + parts[1], parts[2] + parts[3]


def sample(
    images: int, dim: int, *, sides: tuple[Any, Any] = ((3, 4), (2, 3)), seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Two maps around the hinge, and places of their views, some mirrored; float64."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        (torch.randn(images, *side, dim, generator=generator, dtype=torch.float64) + 0.3)
        .requires_grad_() for side in sides
    ]  # fmt: skip
    places = []
    for _ in sides:
        place = 50 * torch.rand(images, 5, generator=generator, dtype=torch.float64) + 20
        place[:, 4] = torch.arange(images) % 2
        places.append(place)
    return maps, places


def test_a_map_of_two_by_two_cells_has_the_loss_worked_by_hand() -> None:
    # The views share the column x = 3, where cells 1 and 3 of either lie: the second is mirrored.
    places = torch.tensor([[0.0, 0, 4, 4, 0]] * 2), torch.tensor([[0.0, 2, 4, 4, 1]] * 2)
    far = [100.0, 100.0]
    z = torch.tensor([[[far, [1, 0]], [far, [1, 1]]], [[far, [-1, 0]], [far, [-1, -1]]]])
    away = [-100.0, 90.0]
    z_prime = torch.tensor([[[away, [1, 2]], [away, [1, 1]]], [[away, [-1, -2]], [away, [-1, -1]]]])
    terms = local_loss(z, z_prime, *places, matches=2, eps=0.0)
    # Location, either way: cells 1 have squared errors 0 and 4, and so invariance 2; deviations
    # sqrt(2), 0 and sqrt(2), sqrt(8), and so variance (1/2 + 0) / 2; covariances 0 and 4, and so
    # 2 * 4**2 / 2. Cells 3 are equal, their covariance is 2, and so the term 2 * 2 * 2**2 / 2.
    location = 2 * ((25 * 2 + 25 / 4 + 16) + 8) / 2
    # Feature: cells 3 match each other. Both cells 1 are nearer to the other map's cell 3 than to
    # its cell 1: squared errors 0 and 1, variances (1/2 + 0) / 2 and 0, covariances 4 and 16 + 4.
    feature = (8 + (25 / 2 + 25 / 4 + 4)) / 2 + (8 + (25 / 2 + 16 + 4)) / 2
    assert (location, feature) == (80.25, 35.625)
    expected = [location + feature, location, feature]
    torch.testing.assert_close(list(terms), [torch.tensor(value) for value in expected])


SETTINGS = {"sim_coeff": 3.0, "std_coeff": 7.0, "cov_coeff": 2.0, "gamma": 1.5,
            "variance_reduction": "sum"}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, SETTINGS])
@pytest.mark.parametrize("matches", [1, 4, 50])  # of 12 and 6 cells
@pytest.mark.parametrize(("images", "dim"), [(6, 3), (3, 5)])
def test_loss_and_gradients_are_those_of_the_definition(
    images: int, dim: int, matches: int, settings: dict[str, Any]
) -> None:
    maps, places = sample(images, dim)
    terms = local_loss(*maps, *places, matches=matches, **settings)
    parts = defined_loss(*maps, *places, matches=matches, **DEFAULTS | settings)
    torch.testing.assert_close((terms.location, terms.feature), parts, rtol=1e-12, atol=1e-12)
    wanted = gradients(3 * (parts[0] + parts[1]), *maps)
    torch.testing.assert_close(gradients(3 * terms.loss, *maps), wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert list(local_loss(*maps, *places, matches=matches, **settings)) == list(terms)


def test_work_in_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, places = sample(4, 3)
    whole = local_loss(*maps, *places, matches=5)
    expected = gradients(whole.loss, *maps)
    monkeypatch.setitem(local.PAIR_ELEMENTS, "cpu", 2 * 2 * 3 * 4)  # two pairs of each image
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", 1)  # one image
    terms = local_loss(*maps, *places, matches=5)
    torch.testing.assert_close(list(terms), list(whole), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(terms.loss, *maps), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_under_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    maps, places = sample(8, 4)
    low = [each.detach().to(dtype).requires_grad_() for each in maps]
    exact = [each.detach().double().requires_grad_() for each in low]
    with torch.autocast("cpu", torch.bfloat16):
        loss = local_loss(*low, *(own.float() for own in places), matches=4).loss
    assert loss.dtype == torch.float32
    expected = local_loss(*exact, *places, matches=4).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for grad, right in zip(gradients(loss, *low), gradients(expected, *exact), strict=True):
        assert grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), right, rtol=tolerance, atol=1e-5)


def test_compiled_code_that_calls_it_is_one_graph_and_gets_the_same() -> None:
    maps, places = sample(4, 3)

    def compute(z: Tensor, z_prime: Tensor) -> Tensor:
        return 3 * local_loss(2 * z, 2 * z_prime, *places, matches=3).loss

    loss = torch.compile(compute, fullgraph=True, backend="aot_eager")(*maps)
    expected = compute(*maps)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(loss, *maps), gradients(expected, *maps))


def test_there_is_no_second_derivative_and_a_retained_graph_gives_the_same_again() -> None:
    maps, places = sample(4, 3)
    loss = local_loss(*maps, *places, matches=3).loss
    first = torch.autograd.grad(loss, maps, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; call backward without"):
        torch.autograd.grad(loss, maps, create_graph=True, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, maps)))


def own_part(images: int) -> tuple[Tensor, ...]:
    """Loss and gradients of this process's images, as an average over processes sees them."""
    maps, places = sample(images, 3)
    own = slice(rank() * images // world_size(), (rank() + 1) * images // world_size())
    mine = [each.detach()[own].requires_grad_() for each in maps]
    terms = local_loss(*mine, *(each[own] for each in places), matches=4)
    grads = gradients(terms.loss, *mine)
    return (*(each.detach() for each in terms), *(grad / world_size() for grad in grads))


def test_two_processes_have_the_loss_and_gradients_of_one(gloo: GlooPool) -> None:
    whole = own_part(6)
    parts = gloo.run(2, own_part, 6)
    for terms in parts:
        torch.testing.assert_close(terms[:3], whole[:3], rtol=1e-12, atol=0)
    for grads, expected in zip(zip(*(part[3:] for part in parts), strict=True), whole[3:],
                               strict=True):  # fmt: skip
        torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("images", "side", "dim", "at_once"),
    [(64, 8, 16, 64 * 64 * 64), (8, 4, 64, 16 * 64**2)],  # distances; covariance of every pair
)
def test_memory_is_bounded_by_blocks(
    images: int, side: int, dim: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(local.PAIR_ELEMENTS, "cpu", 2**13)
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", 2**13)
    z, z_prime = (torch.randn(images, side, side, dim, requires_grad=True) for _ in range(2))
    places = 50 * torch.rand(images, 5)
    with LargestOutput() as largest:
        local_loss(z, z_prime, places, places, matches=side**2).loss.backward()
    assert z.numel() <= largest.elements <= max(z.numel(), 2**13) < at_once


Change = Callable[[list[Any], list[Any]], object]
REFUSED: list[tuple[Change, dict[str, Any], str]] = [
    (lambda z, _: z.__setitem__(0, z[0][0]), {}, "must be maps .* got \\(3, 4, 3\\) and"),
    (lambda z, _: z.__setitem__(1, z[1][..., :2]), {}, "must be maps .* alike in images and"),
    (lambda z, _: z.__setitem__(1, z[1][:, :0]), {}, "with cells"),
    (lambda z, _: z.__setitem__(0, z[0].tolist()), {}, "as tensors"),
    (lambda z, _: z.__setitem__(0, z[0].long()), {}, "embeddings must be floating point"),
    (lambda _, p: p.__setitem__(0, p[0][:, :4]), {}, "^places must hold top, left, .* \\(4, 4\\)"),
    (lambda _, p: p.__setitem__(1, p[1][:2]), {}, "^places_prime must hold .* of 4 images"),
    (lambda *_: None, {"matches": 0}, "matches must be a whole number of at least 1, got 0"),
    (lambda *_: None, {"sim_coeff": -1}, "sim_coeff must be a finite number of at least 0"),
]


@pytest.mark.parametrize(("change", "settings", "sentence"), REFUSED)
def test_other_inputs_are_refused(change: Change, settings: dict[str, Any], sentence: str) -> None:
    maps, places = sample(4, 3)
    change(maps, places)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=sentence):
        local_loss(*maps, *places, **settings)


def test_one_image_alone_is_refused() -> None:
    maps, places = sample(1, 3)
    with pytest.raises(ValueError, match="at least 2 images over all processes, got 1"):
        local_loss(*maps, *places)
