import pytest

from ray_ds.on_ray.sizing import Node, Offer, Sizes, joining, workers_that_fit


@pytest.mark.parametrize(
    ("room", "allowed", "size"),
    [(0, None, 0), (1, None, 0), (2, None, 2), (5, None, 5), (99, None, 8), (7, (2, 4, 8), 4), (3, (4, 8), 0)],
)
def test_largest_size_that_fits_and_is_allowed(room: int, allowed: tuple[int, ...] | None, size: int) -> None:
    assert Sizes(min_workers=2, max_workers=8, allowed=allowed).largest(room) == size


def test_the_scarcest_resource_counts_and_rounding_does_not() -> None:
    assert workers_that_fit({"CPU": 8, "GPU": 3}, {"CPU": 2, "GPU": 1}, 99) == 3
    assert workers_that_fit({"CPU": 0.3 - 1e-9}, {"CPU": 0.1}, 99) == 3
    assert workers_that_fit({"CPU": 8}, {"CPU": 2, "GPU": 1}, 99) == 0
    assert workers_that_fit({}, {"CPU": 0}, 5) == 5


def test_an_offer_that_changes_starts_again() -> None:
    offer = Offer()
    assert [offer.stands(size, now) for now, size in enumerate([2, 2, 3, 3, 0, 3, 3])] == [0, 1, 0, 1, 0, 0, 1]


def test_workers_join_where_there_is_room_and_no_more_than_fit_the_size() -> None:
    nodes = [Node(node_id=name, address=("", 0), total=4, free=free) for name, free in (("a", 2), ("b", 4), ("c", 4))]
    assert joining(nodes, {"a": 2}, 7) == {"b": 4, "c": 1}
    assert joining(nodes, {"a": 2}, 2) == {}
