"""Which items share a row, so that little of it is left empty: best fit, the longest first."""

import bisect

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return the items of each row: an item goes where it leaves the least room, the longest items first.

    The result depends on nothing but the arguments. Items that are longer than a row, and those of length 0, are in
    none.

    Args:
        lengths: of the items, which are known by their places here.
        capacity: of a row.
    Source: best-fit packing, arXiv 2404.10830; at most 11/9 of the fewest rows (Johnson 1974).
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    """The rooms that some row has, sorted."""
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if not 0 < length <= capacity:
            continue
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(item)
        left = room - length
        if left:
            if left not in rows_by_room:
                bisect.insort(rooms, left)
            rows_by_room.setdefault(left, []).append(row)
    return rows
