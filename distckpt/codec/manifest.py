"""Manifests to bytes and back, with all that a manifest says about itself checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from distckpt import dtypes
from distckpt._pb import manifest_pb2 as pb
from distckpt.codec.envelope import unwrap, wrap
from distckpt.codec.plain import from_value, to_value
from distckpt.errors import CorruptCheckpoint, LayoutError, UnsupportedFormat
from distckpt.layout import BALANCED, CEILING, Grid, Layout, wrong_covers
from distckpt.manifest import (
    DATA_ALIGNMENT,
    TABLE_DIGEST_BYTES,
    Manifest,
    pad_columns,
    table_bytes,
)
from distckpt.plan import WritePlan
from distckpt.state import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_BYTES

MAX_BYTES = 1 << 62
_MAX_HEADER_BYTES = 100_000_000
_MAX_BLOCK_BYTES = 1 << 30
# Cells of a grid for each file: a file holds a box or a few of a tensor. A few bytes must not
# expand to any number of boxes.
_MOST_CELLS = 64
# And over all tensors, and over all names what they share with the one before.
_MAX_BOXES = 1 << 26
_MAX_SHARED_BYTES = 1 << 28
# A cover in more dimensions than this may take too long to check.
_EASY_DIMENSIONS = 4
_RULES = {BALANCED: pb.BALANCED, CEILING: pb.CEILING}


@dataclass(frozen=True, slots=True)
class EncodedStructure:
    """What the manifests of one plan have in common, encoded: the messages of these names."""

    tensors: bytes
    layouts: bytes


def encode_structure(structure: Manifest | WritePlan, *, files: int) -> EncodedStructure:
    """Encode names, types and layouts.

    Args:
        structure: Has them: a manifest, or the plan of many.
        files: Number of shard files.

    Raises:
        LayoutError: Beyond the limits of the format: `decode` would refuse it.
    """
    boxes = _count_boxes(structure.layouts, structure.layout)
    if boxes > _MAX_BOXES:
        raise LayoutError(f"{boxes} boxes; a checkpoint has at most {_MAX_BOXES}")
    # Fails where there are more than can be checked in so many dimensions.
    _check_cover([found for found in structure.layouts if len(found.shape) > _EASY_DIMENSIONS])
    layouts = _encode_layouts(structure.layouts, files)
    return EncodedStructure(
        _encode_tensors(structure).SerializeToString(), layouts.SerializeToString()
    )


def encode(manifest: Manifest, structure: EncodedStructure | None = None) -> bytes:
    """Encode a manifest, envelope included.

    Args:
        manifest: The manifest.
        structure: Its own, or that of another of the same plan, where it is known.

    Raises:
        LayoutError: As `encode_structure` does.
    """
    structure = structure or encode_structure(manifest, files=len(manifest.file_length))
    message = pb.Manifest(
        save_id=manifest.save_id,
        created_ns=manifest.created_ns,
        ranks=manifest.ranks,
        block_bytes=manifest.block_bytes,
        step=manifest.step,
        tensors=pb.Tensors.FromString(structure.tensors),
        layouts=pb.Layouts.FromString(structure.layouts),
        files=pb.Files(
            length=manifest.file_length.tolist(),
            data_start=manifest.file_data_start.tolist(),
            digest=b"".join(manifest.file_digest),
        ),
    )
    if manifest.values:
        message.values.name.extend(manifest.values)
        message.values.value.extend(
            to_value(value, name) for name, value in manifest.values.items()
        )
    if manifest.per_rank:
        message.per_rank.name.extend(manifest.per_rank)
        for lengths in manifest.per_rank.values():
            message.per_rank.length.extend(lengths.tolist())
        message.per_rank.file.extend(manifest.per_rank_file.tolist())
    if manifest.metadata is not None:
        message.metadata.CopyFrom(to_value(dict(manifest.metadata), "metadata"))
    if manifest.metrics is not None:
        message.metrics.CopyFrom(to_value(dict(manifest.metrics), "metrics"))
    return wrap(message.SerializeToString(deterministic=True))


def _count_boxes(layouts: Sequence[Layout], used: np.ndarray) -> int:
    return int(np.array([len(layout) for layout in layouts], np.int64)[used].sum())


def _encode_tensors(structure: Manifest | WritePlan) -> Any:
    suffix, shared, before = [], [], 0
    left = _MAX_SHARED_BYTES
    for name in structure.names:
        # As numbers whose lowest digits are the first bytes: thousands are compared fast.
        data = name.encode()
        number = int.from_bytes(data, "little")
        differs = number ^ before
        size = ((differs & -differs).bit_length() - 1) // 8 if differs else 0
        if len(data) > len(name):
            size = _whole_characters(data, size)
        if size > left:
            size = 0
        suffix.append(name[size:] if len(data) == len(name) else data[size:].decode())
        shared.append(size)
        left -= size
        before = number
    return pb.Tensors(
        suffix=suffix,
        shared=shared,
        dtype=structure.dtype.tolist(),
        layout=structure.layout.tolist(),
    )


def _whole_characters(data: bytes, size: int) -> int:
    """Return how many of the first bytes of UTF-8 are whole characters."""
    while size < len(data) and data[size] & 0xC0 == 0x80:  # noqa: PLR2004  goes on with one
        size -= 1
    return size


def _encode_layouts(layouts: Sequence[Layout], files: int) -> Any:
    message = pb.Layouts()
    for layout in layouts:
        message.ndim.append(len(layout.shape))
        message.shape.extend(layout.shape)
        grid = layout.grid()
        if grid is None or len(layout) > _MOST_CELLS * files:
            message.boxes.append(len(layout))
            message.start.extend(layout.start.reshape(-1).tolist())
            message.extent.extend((layout.stop - layout.start).reshape(-1).tolist())
            message.file.extend(layout.file.tolist())
        else:
            message.boxes.append(0)
            message.parts.extend(grid.parts)
            message.rule.extend(_RULES[rule] for rule in grid.rule)
            message.file_base.append(grid.file_base)
            message.file_stride.extend(grid.file_stride)
    return message


def decode(data: bytes, *, path: str = "manifest") -> Manifest:
    """Decode a manifest, and check all that it says about itself.

    Raises:
        UnsupportedFormat: Not ours, or newer.
        CorruptCheckpoint: Damaged, or it breaks an invariant of the format.
    """
    payload = unwrap(data, path=path)
    try:
        message = pb.Manifest.FromString(payload)
        return _decode(message)
    except CorruptCheckpoint as exc:
        raise CorruptCheckpoint(f"{path}: {exc}", path=path) from exc
    except UnsupportedFormat as exc:
        raise UnsupportedFormat(f"{path}: {exc}") from exc
    except (DecodeError, ValueError, TypeError, RecursionError) as exc:
        raise CorruptCheckpoint(f"{path}: not a valid manifest: {exc}", path=path) from exc


def _decode(message: Any) -> Manifest:
    files = message.files
    count = len(files.length)
    _need(message.save_id != 0, "the save id is 0")
    _need(message.ranks >= 1, "it was saved by no rank")
    block_bytes = message.block_bytes
    _need(
        DATA_ALIGNMENT <= block_bytes <= _MAX_BLOCK_BYTES and block_bytes & (block_bytes - 1) == 0,
        f"a block size of {block_bytes} bytes",
    )
    _need(
        len(files.data_start) == count and len(files.digest) == count * TABLE_DIGEST_BYTES,
        "columns of unequal length for the files",
    )
    length, data_start = _column(files.length), _column(files.data_start)
    in_range = (data_start > 0) & (data_start <= _MAX_HEADER_BYTES)
    _need(
        (in_range & (data_start % DATA_ALIGNMENT == 0)).all(),
        f"a shard file's data does not start at a multiple of {DATA_ALIGNMENT}",
    )
    structure = _structure(
        message.tensors.SerializeToString(), message.layouts.SerializeToString(), count
    )
    values = message.values
    _need(len(values.name) == len(values.value), "columns of unequal length for the values")
    per_rank, per_rank_file = _decode_per_rank(message.per_rank, message.ranks, count)
    manifest = Manifest(
        save_id=message.save_id,
        created_ns=message.created_ns,
        ranks=message.ranks,
        block_bytes=block_bytes,
        step=message.step if message.HasField("step") else None,
        names=structure.names,
        dtype=structure.dtype,
        layout=structure.layout,
        layouts=structure.layouts,
        file_length=length,
        file_data_start=data_start,
        file_digest=[
            files.digest[index : index + TABLE_DIGEST_BYTES]
            for index in range(0, len(files.digest), TABLE_DIGEST_BYTES)
        ],
        values={
            name: from_value(value) for name, value in zip(values.name, values.value, strict=True)
        },
        per_rank=per_rank,
        per_rank_file=per_rank_file,
        metadata=_dict(message, "metadata"),
        metrics=_dict(message, "metrics"),
    )
    others = [*values.name, *message.per_rank.name]
    _check_names(others)
    _need(structure.known.isdisjoint(others), "a name is there twice")
    # Sums of numbers in range may leave it; as floats they can't.
    _need(manifest.largest_file_bytes <= MAX_BYTES, "tensors beyond all limits in one file")
    table_start = manifest.file_table_start
    expected = table_start + [table_bytes(start, block_bytes) for start in table_start.tolist()]
    _need(
        np.array_equal(expected, length),
        "a shard file's length is not that of its tensors and checksums",
    )
    return manifest


@dataclass(frozen=True, slots=True)
class _Structure:
    """What the manifests of a run have in common, checked: of what tensors, and how they are cut.

    Attributes:
        known: The names as a set; the others as in `Manifest`.
    """

    names: Sequence[str]
    dtype: np.ndarray
    layout: np.ndarray
    layouts: Sequence[Layout]
    known: frozenset[str]


# Two: of a run that is read, and of another that is compared with it.
@lru_cache(2)
def _structure(tensors: bytes, layouts: bytes, files: int) -> _Structure:
    """Decode the messages of these names; once, as long as a run's checkpoints are alike.

    Args:
        tensors: A message, encoded.
        layouts: Another.
        files: Number of files.
    """
    found = _decode_layouts(pb.Layouts.FromString(layouts), files)
    message = pb.Tensors.FromString(tensors)
    names = _decode_names(message)
    dtype, layout = _column(message.dtype), _column(message.layout)
    _need(len(dtype) == len(layout) == len(names), "columns of unequal length for the tensors")
    unknown = [code for code in np.unique(dtype).tolist() if code not in dtypes.BY_CODE]
    if unknown:
        raise UnsupportedFormat(f"unknown dtype codes {unknown}; install a newer distckpt")
    _need((layout < len(found)).all(), "a tensor's layout does not exist")
    boxes = _count_boxes(found, layout)
    _need(boxes <= _MAX_BOXES, f"{boxes} boxes")
    _check_names(names)
    for index in np.unique(layout * 256 + dtype).tolist():
        shape = found[index // 256].shape
        _need(
            math.prod(extent or 1 for extent in shape) * dtypes.BY_CODE[index % 256].itemsize
            <= MAX_TENSOR_BYTES,
            f"a tensor of shape {shape} is too large",
        )
    # Several manifests have them.
    dtype.setflags(write=False)
    layout.setflags(write=False)
    return _Structure(names, dtype, layout, found, frozenset(names))


def _check_names(names: Sequence[str]) -> None:
    _need(len(set(names)) == len(names), "a name is there twice")
    _need("\0" not in "".join(names), "a name holds a NUL character")


def _decode_names(tensors: Any) -> list[str]:
    _need(len(tensors.suffix) == len(tensors.shared), "columns of unequal length for the names")
    total = int(_column(tensors.shared).sum())
    _need(total <= _MAX_SHARED_BYTES, f"names that share {total} bytes")
    names, previous = [], b""
    for suffix, shared in zip(tensors.suffix, tensors.shared, strict=True):
        if shared > len(previous):
            raise _broken("a name shares more than the name before it has")
        previous = previous[:shared] + suffix.encode()
        if len(previous) > MAX_NAME_BYTES:
            raise _broken(f"a name of {len(previous)} bytes")
        names.append(previous.decode())
    return names


def _decode_layouts(message: Any, files: int) -> list[Layout]:
    ndim, shape, boxes = _column(message.ndim), _column(message.shape), _column(message.boxes)
    start, extent, file = _column(message.start), _column(message.extent), _column(message.file)
    parts, rule = _column(message.parts), _column(message.rule, signed=True)
    file_base, file_stride = _column(message.file_base), _column(message.file_stride, signed=True)
    is_grid = boxes == 0
    _need((ndim <= MAX_DIMENSIONS).all(), f"more than {MAX_DIMENSIONS} dimensions")
    _need(
        len(boxes) == len(ndim)
        and len(shape) == ndim.sum()
        and len(start) == len(extent) == (boxes * ndim).sum()
        and len(file) == boxes.sum()
        and len(parts) == len(rule) == len(file_stride) == ndim[is_grid].sum()
        and len(file_base) == is_grid.sum(),
        "columns of unequal length for the layouts",
    )
    _need((parts >= 1).all() and np.isin(rule, list(_RULES)).all(), "a grid of no or unknown cut")
    _need((file < files).all(), "a box lies in a file that does not exist")
    cells, at = 0, 0
    for dims in ndim[is_grid].tolist():
        cells += math.prod(parts[at : at + dims].tolist())
        at += dims
    _need(cells <= _MAX_BOXES, f"grids of {cells} boxes")
    layouts: list[Layout] = []
    at_shape = at_box = at_number = at_grid = at_base = 0
    for dims, count in zip(ndim.tolist(), boxes.tolist(), strict=True):
        whole = tuple(shape[at_shape : at_shape + dims].tolist())
        _need(math.prod(extent or 1 for extent in whole) <= MAX_BYTES, f"a shape of {whole}")
        at_shape += dims
        if count:
            low = start[at_number : at_number + count * dims].reshape(count, dims)
            high = low + extent[at_number : at_number + count * dims].reshape(count, dims)
            layouts.append(Layout(whole, low, high, file[at_box : at_box + count]))
            at_number += count * dims
            at_box += count
        else:
            numbers = slice(at_grid, at_grid + dims)
            grid = Grid(
                tuple(parts[numbers].tolist()),
                tuple(rule[numbers].tolist()),
                int(file_base[at_base]),
                tuple(file_stride[numbers].tolist()),
            )
            _need(
                math.prod(grid.parts) <= _MOST_CELLS * files,
                f"a grid of {grid.parts} over {files} files",
            )
            layouts.append(Layout.of_grid(whole, grid))
            _need(layouts[-1].used_parts() == grid.parts, f"a grid of {grid.parts} of {whole}")
            # The first and the last file that any of its boxes lies in.
            ends = [
                stride * (count - 1)
                for stride, count in zip(grid.file_stride, grid.parts, strict=True)
            ]
            _need(
                grid.file_base + sum(min(end, 0) for end in ends) >= 0
                and grid.file_base + sum(max(end, 0) for end in ends) < files,
                "a grid lies in a file that does not exist",
            )
            at_grid += dims
            at_base += 1
    _check_cover(layouts)
    return layouts


def _check_cover(layouts: Sequence[Layout]) -> None:
    """Check invariant I3, that boxes cover a layout's shape exactly once; and their order."""
    for layout in layouts:
        if 0 in layout.shape or not layout.shape:
            whole = [0] * len(layout.shape)
            _need(
                len(layout) == 1
                and layout.start[0].tolist() == whole
                and tuple(layout.stop[0].tolist()) == layout.shape,
                f"a layout of shape {layout.shape} is not one whole box",
            )
    # A grid covers its shape by what it is.
    proper = [
        layout
        for layout in layouts
        if layout.shape and 0 not in layout.shape and not layout.is_grid
    ]
    if not proper:
        return
    width = max(len(layout.shape) for layout in proper)
    tensor = np.repeat(np.arange(len(proper)), [len(layout) for layout in proper])
    start = np.concatenate([pad_columns(layout.start, width, 0) for layout in proper])
    stop = np.concatenate([pad_columns(layout.stop, width, 1) for layout in proper])
    shape = pad_columns(
        np.array([[1] * (width - len(x.shape)) + list(x.shape) for x in proper], np.int64), width, 1
    )
    _need((start < stop).all(), "an empty box")
    faulty = wrong_covers(tensor, start, stop, shape)
    shapes = [proper[index].shape for index in faulty.tolist()]
    _need(not shapes, f"the boxes of tensors of shapes {shapes} do not cover them exactly once")
    order = np.lexsort((*start.T[::-1], tensor))
    _need((order == np.arange(len(order))).all(), "boxes that are not in order")


def _decode_per_rank(
    message: Any, ranks: int, files: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    names = list(message.name)
    if not names:
        return {}, np.zeros(0, np.int64)
    length, file = _column(message.length), _column(message.file)
    _need(
        len(length) == len(names) * ranks and len(file) == ranks,
        "columns of unequal length for the per-rank values",
    )
    table = length.reshape(len(names), ranks)
    _need(
        (table.sum(axis=0, dtype=np.float64) <= MAX_BYTES).all(),
        "per-rank values beyond all limits in one file",
    )
    holders = np.flatnonzero((table > 0).any(axis=0))
    _need(
        (file[holders] < files).all() and len(np.unique(file[holders])) == len(holders),
        "per-rank values lie in files that do not exist, or two ranks' in one",
    )
    return dict(zip(names, table, strict=True)), file


def _dict(message: Any, field: str) -> dict[str, Any] | None:
    if not message.HasField(field):
        return None
    value = from_value(getattr(message, field))
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"the {field} is not a dict")
    return value


def _column(values: Any, *, signed: bool = False) -> np.ndarray:
    column = np.array(values, np.int64 if signed else np.uint64)
    if not signed:
        _need(not len(column) or int(column.max()) <= MAX_BYTES, "a number beyond all limits")
    return column.astype(np.int64)


def _need(condition: object, fault: str) -> None:
    """Refuse the manifest unless the condition, Python's or numpy's, is true."""
    if not condition:
        raise _broken(fault)


def _broken(fault: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the manifest breaks the format: {fault}")
