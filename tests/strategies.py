"""What several test files draw from hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from distckpt.region import Region


def split(draw, region, count):
    """Cut a region into up to so many boxes, anywhere."""
    boxes = [region]
    for _ in range(count - 1):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dims = [dim for dim, extent in enumerate(box.shape) if extent > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = draw(st.sampled_from(dims))
        at = draw(st.integers(box.start[dim] + 1, box.stop[dim] - 1))
        low, high = list(box.stop), list(box.start)
        low[dim] = high[dim] = at
        boxes += [Region(box.start, tuple(low)), Region(tuple(high), box.stop)]
    return boxes
