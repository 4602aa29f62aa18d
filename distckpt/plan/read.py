"""Who reads what, and sends it to whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distckpt.manifest import Pieces
from distckpt.plan.balance import balance
from distckpt.plan.columns import distinct_lists
from distckpt.region import boxes_of_runs, ranges

# The first and the last block of a stretch always hold wanted elements.
_ENDS = 2


@dataclass(frozen=True, slots=True)
class Wants:
    """What ranks want to read, as columns: a row is a box of a tensor.

    Attributes:
        rank: (wants,) who wants it.
        key: (wants,) the wanting rank's own number for the row.
        tensor: (wants,) index of the saved tensor, ascending not required.
        start: (wants, width) padded as the pieces are.
        stop: (wants, width).
    """

    rank: np.ndarray
    key: np.ndarray
    tensor: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True, slots=True)
class Fragments:
    """Copies to make: a row takes from one block of a file what one want needs of one piece.

    Attributes:
        round: (rows,) the round in which it happens.
        reader: (rows,) who reads the block.
        consumer: (rows,) who wants it.
        key: (rows,) the consumer's number of the want.
        file: (rows,) the file.
        block: (rows,) the block's number in the file.
        itemsize: (rows,) bytes of an element.
        offset_bytes: (rows,) where the piece begins in the file.
        piece_start: (rows, width) the stored box.
        piece_stop: (rows, width).
        start: (rows, width) the part of it that is wanted, over all its blocks.
        stop: (rows, width).
    """

    round: np.ndarray
    reader: np.ndarray
    consumer: np.ndarray
    key: np.ndarray
    file: np.ndarray
    block: np.ndarray
    itemsize: np.ndarray
    offset_bytes: np.ndarray
    piece_start: np.ndarray
    piece_stop: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, index: np.ndarray) -> Fragments:
        """Select rows."""
        return Fragments(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def by_rank(self, ranks: int) -> list[np.ndarray]:
        """Return for each rank the rows that it reads or receives."""
        rows = np.arange(len(self.reader))
        others = np.flatnonzero(self.consumer != self.reader)
        rank = np.concatenate([self.reader, self.consumer[others]])
        rows = np.concatenate([rows, others])
        order = np.lexsort((rows, rank))
        return np.split(rows[order], np.searchsorted(rank[order], np.arange(1, ranks)))

    def of_rank(self, rank: int) -> Fragments:
        """Select what a rank reads or receives."""
        return self.take(np.flatnonzero((self.reader == rank) | (self.consumer == rank)))


def plan_read(
    pieces: Pieces,
    itemsize: np.ndarray,
    wants: Wants,
    *,
    block_bytes: int,
    ranks: int,
    round_bytes: int = 32 << 20,
) -> Fragments:
    """Decide who reads what, and what is sent to whom.

    Every block of a file that anyone wants bytes of is read once, by one of the ranks that want
    some of it; blocks that several want are shared out so that all read the same number of bytes.

    Args:
        pieces: What is stored, by tensor and start.
        itemsize: (tensors,) bytes of an element.
        wants: What is wanted, by all ranks.
        block_bytes: Size of a block.
        ranks: Number of ranks.
        round_bytes: At most so many bytes does a rank read in a round.

    Returns:
        The copies, in order of round, file, block, consumer and want: on the reader's and on the
        consumer's side alike.
    """
    piece, want = _intersecting(pieces, wants)
    start = np.maximum(pieces.start[piece], wants.start[want])
    stop = np.minimum(pieces.stop[piece], wants.stop[want])
    extent = pieces.stop[piece] - pieces.start[piece]
    size = itemsize[pieces.tensor[piece]]
    # The stretch of the piece's C order from the first to the last wanted element.
    step = np.ones_like(extent)
    for dim in range(extent.shape[1] - 2, -1, -1):
        step[:, dim] = step[:, dim + 1] * extent[:, dim + 1]
    low = ((start - pieces.start[piece]) * step).sum(axis=1)
    high = ((stop - 1 - pieces.start[piece]) * step).sum(axis=1) + 1
    first = (pieces.offset_bytes[piece] + low * size) // block_bytes
    last = (pieces.offset_bytes[piece] + high * size - 1) // block_bytes
    count = last - first + 1
    row = np.repeat(np.arange(len(piece)), count)
    block = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    keep = _touched(
        pieces,
        piece[row],
        start[row],
        stop[row],
        begin_byte=block * block_bytes,
        end_byte=(block + 1) * block_bytes,
        itemsize=size[row],
        blocks=count[row],
    )
    row, block = row[keep], block[keep]
    piece, want, start, stop, size = piece[row], want[row], start[row], stop[row], size[row]
    file = pieces.file[piece]
    per_round = max(1, round_bytes // block_bytes)
    reader, round_ = _readers(file, block, wants.rank[want], ranks=ranks, per_round=per_round)
    order = np.lexsort((wants.key[want], wants.rank[want], block, file, round_))
    return Fragments(
        round_,
        reader,
        wants.rank[want],
        wants.key[want],
        file,
        block,
        size,
        pieces.offset_bytes[piece],
        pieces.start[piece],
        pieces.stop[piece],
        start,
        stop,
    ).take(order)


def _intersecting(pieces: Pieces, wants: Wants) -> tuple[np.ndarray, np.ndarray]:
    """Find the pairs (piece, want) of one tensor that have elements in common.

    Within a tensor the pieces are sorted by their first cut dimension's start; the candidates of a
    want are those from the first that reaches beyond its start to the last that begins before its
    stop. Looked for in all tensors at once: on a line on which they follow one another.
    """
    stored = np.flatnonzero(pieces.size_bytes > 0)
    tensors, first, of_piece = np.unique(
        pieces.tensor[stored], return_index=True, return_inverse=True
    )
    of_want = np.minimum(np.searchsorted(tensors, wants.tensor), max(len(tensors) - 1, 0))
    wanted = (wants.start < wants.stop).all(axis=1)
    wanted &= tensors[of_want] == wants.tensor if len(tensors) else False
    rows = np.flatnonzero(wanted)
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    of_want = of_want[rows]
    differs = pieces.start[stored] != pieces.start[stored[first]][of_piece]
    cut = np.logical_or.reduceat(differs, first, axis=0)
    dim = np.where(cut.any(axis=1), cut.argmax(axis=1), cut.shape[1] - 1)
    at = dim[of_piece], dim[of_want]
    ends = (
        pieces.start[stored, at[0]],
        pieces.stop[stored, at[0]],
        wants.start[rows, at[1]],
        wants.stop[rows, at[1]],
    )
    # By their order, not by themselves: the sum of extents may be too large a number.
    values, place = np.unique(np.concatenate(ends), return_inverse=True)
    begin, end, low, high = np.split(place.reshape(-1), np.cumsum([len(x) for x in ends[:-1]]))
    step = len(values) + 1
    reach = np.maximum.accumulate(of_piece * step + end)
    from_ = np.searchsorted(reach, of_want * step + low, side="right")
    to = np.searchsorted(of_piece * step + begin, of_want * step + high, side="left")
    count = np.maximum(to - from_, 0)
    want, piece = np.repeat(rows, count), stored[ranges(from_, count)]
    common = (
        np.maximum(pieces.start[piece], wants.start[want])
        < np.minimum(pieces.stop[piece], wants.stop[want])
    ).all(axis=1)
    # By tensor, and then as the wants came.
    piece, want = piece[common], want[common]
    order = np.lexsort((want, pieces.tensor[piece]))
    return piece[order], want[order]


def _touched(
    pieces: Pieces,
    piece: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    *,
    begin_byte: np.ndarray,
    end_byte: np.ndarray,
    itemsize: np.ndarray,
    blocks: np.ndarray,
) -> np.ndarray:
    """Tell which blocks hold wanted elements: one can fall between two wanted rows.

    Args:
        pieces: What is stored.
        piece: (rows,) the piece that each row's block lies in.
        start: (rows, width) the wanted part of the piece.
        stop: (rows, width).
        begin_byte: (rows,) where the block begins in the file.
        end_byte: (rows,) and where it ends.
        itemsize: (rows,) bytes of an element.
        blocks: (rows,) how many blocks the stretch of the wanted part touches.
    """
    begin = np.maximum(begin_byte - pieces.offset_bytes[piece], 0) // itemsize
    end = (end_byte - pieces.offset_bytes[piece]) // itemsize
    origin = pieces.start[piece]
    extent = pieces.stop[piece] - origin
    end = np.minimum(end, extent.prod(axis=1))
    touched = np.ones(len(piece), bool)
    doubtful = np.flatnonzero(blocks > _ENDS)
    of, box_start, box_stop = boxes_of_runs(extent[doubtful], begin[doubtful], end[doubtful])
    rows = doubtful[of]
    common = (
        np.maximum(box_start + origin[rows], start[rows])
        < np.minimum(box_stop + origin[rows], stop[rows])
    ).all(axis=1)
    touched[doubtful] = False
    touched[rows[common]] = True
    return touched


def _readers(
    file: np.ndarray,
    block: np.ndarray,
    consumer: np.ndarray,
    *,
    ranks: int,
    per_round: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the reader and the round of each row's block."""
    order = np.lexsort((consumer, block, file))
    file, block, consumer = file[order], block[order], consumer[order]
    new = np.ones(len(order), bool)
    new[1:] = (file[1:] != file[:-1]) | (block[1:] != block[:-1])
    which = np.cumsum(new) - 1  # number of the distinct block
    first = np.flatnonzero(new)
    # Who wants each block, each rank once.
    other = new.copy()
    other[1:] |= consumer[1:] != consumer[:-1]
    wanting = consumer[other]
    edges = np.append(np.cumsum(other)[first] - 1, len(wanting))
    lists, group = distinct_lists(wanting, edges)
    groups = [wanting[edges[number] : edges[number + 1]] for number in lists.tolist()]
    alone = np.array([len(found) == 1 for found in groups], bool)
    lowest = np.array([found[0] for found in groups], np.int64)
    reader = lowest[group]
    load = np.bincount(reader[alone[group]], minlength=ranks) if len(first) else np.zeros(ranks)
    shared = np.flatnonzero(~alone)
    members = np.argsort(group, kind="stable")
    begins = np.searchsorted(group[members], shared)
    counts = np.searchsorted(group[members], shared, side="right") - begins
    shares = balance(
        load,
        [
            (groups[number], count)
            for number, count in zip(shared.tolist(), counts.tolist(), strict=True)
        ],
    )
    for number, begin, count, share in zip(
        shared.tolist(), begins.tolist(), counts.tolist(), shares, strict=True
    ):
        # Stretches of blocks, so that a rank opens few files.
        reader[members[begin : begin + count]] = np.repeat(groups[number], share)
    # A rank reads its blocks in the order of file and block, a fixed number a round.
    by_reader = np.argsort(reader, kind="stable")
    edges = np.searchsorted(reader[by_reader], np.arange(ranks))
    round_ = np.empty(len(first), np.int64)
    round_[by_reader] = (np.arange(len(first)) - edges[reader[by_reader]]) // per_round
    reader_out, round_out = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    reader_out[order], round_out[order] = reader[which], round_[which]
    return reader_out, round_out
