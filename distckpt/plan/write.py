"""Who writes what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from distckpt.bundle import Distinct
from distckpt.errors import LayoutError
from distckpt.layout import Layout
from distckpt.manifest import order_in_file
from distckpt.plan.columns import distinct_lists, hash_rows
from distckpt.plan.grids import LISTED_CELLS, Family, find_families
from distckpt.plan.merge import Tensors, Use, World, merge
from distckpt.plan.parts import CheckTable, GridTable, PartTables, RowTable, parts_to_bytes
from distckpt.plan.segments import Segments, expand, find_segments
from distckpt.plan.share import Shares, share_out
from distckpt.region import boxes_of_runs

REPLICA_RULES = ("check", "rank0", "trust")
Replicas = str | Mapping[str, str]

# safetensors refuses headers from 100 MB on; ours stay well below.
_HEADER_LIMIT_BYTES = 48 << 20
DEFAULT_SHARD_BYTES = 64 << 30


@dataclass(frozen=True, slots=True)
class WritePlan:
    """A save, decided for all ranks; the static part of its manifest.

    Attributes:
        names: Tensor names: rank 0's in the order of its state, then the others, sorted.
        dtype: (tensors,) dtype codes.
        layout: (tensors,) index into layouts.
        layouts: Each distinct layout once.
        files: Number of shard files.
        file_rank: (files,) which rank writes each.
        blob_file: (ranks,) the file of each rank's per-rank values, or -1.
        rank_bytes: (ranks,) bytes of tensors that each rank writes.
        per_rank: Names of the per-rank values.
        check_first: (n,) the first comparison of each stretch of comparisons of one tensor.
        check_tensor: (n,) that tensor.
        tables: What the ranks are told.
    """

    names: tuple[str, ...]
    dtype: np.ndarray
    layout: np.ndarray
    layouts: list[Layout]
    files: int
    file_rank: np.ndarray
    blob_file: np.ndarray
    rank_bytes: np.ndarray
    per_rank: tuple[str, ...]
    check_first: np.ndarray
    check_tensor: np.ndarray
    tables: PartTables

    def tensor_of_check(self, check: int) -> str:
        """Return the name of the tensor that a comparison is about."""
        row = int(np.searchsorted(self.check_first, check, side="right")) - 1
        return self.names[int(self.check_tensor[row])]

    def parts(self) -> list[Distinct]:
        """Return what each rank is told, in three columns; `part_from_bytes` reads it."""
        return parts_to_bytes(self.tables)


def plan_write(
    templates: Distinct,
    owns: Distinct,
    *,
    replicas: Replicas = "check",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    listed_cells: int = LISTED_CELLS,
) -> WritePlan:
    """Decide who writes what.

    Args:
        templates: Of the ranks' summaries.
        owns: Of the ranks' summaries.
        replicas: ``"check"``, ``"rank0"`` or ``"trust"``, or a mapping of glob → one of these (the
            first that fits).
        max_shard_bytes: A rank's file is split before it exceeds this.
        listed_cells: Of a regular tensor in more boxes than this, the boxes are not listed.

    Returns:
        The plan for all ranks.

    Raises:
        LayoutError: Ranks that disagree on a tensor, and tensors that are not covered exactly once:
            all of them.
    """
    world = merge(templates, owns)
    rule = _rules(world.tensors.names, replicas)
    families, uses = find_families(
        world, one_holder=rule == REPLICA_RULES.index("rank0"), listed_cells=listed_cells
    )
    plan = _plan(world, rule, families, uses, max_shard_bytes)
    if plan is None:
        # A rank's files would have to be split: no grid says where.
        plan = _plan(world, rule, [], world.uses, max_shard_bytes)
    if plan is None:
        raise LayoutError("a plan without grids was refused for its grids")
    return plan


def _rules(names: Sequence[str], replicas: Replicas) -> np.ndarray:
    """Return each tensor's rule as an index into REPLICA_RULES."""
    given = dict(replicas) if isinstance(replicas, Mapping) else {"*": replicas}
    if any(rule not in REPLICA_RULES for rule in given.values()):
        raise LayoutError(
            f"replicas={replicas!r}: expected one of {', '.join(map(repr, REPLICA_RULES))}, or a "
            "mapping of glob → one of these"
        )
    if isinstance(replicas, str):
        return np.full(len(names), REPLICA_RULES.index(replicas))
    rules = [
        next((rule for glob, rule in given.items() if fnmatchcase(name, glob)), "check")
        for name in names
    ]
    return np.array([REPLICA_RULES.index(rule) for rule in rules], np.int64)


def _plan(
    world: World,
    rule: np.ndarray,
    families: list[Family],
    uses: list[Use],
    max_shard_bytes: int,
) -> WritePlan | None:
    """Plan; None if the families' ranks need more than one file."""
    tensors = world.tensors
    held = expand(world, uses)
    known = [family.tensor for family in families] + [world.empty[:, 0]]
    segments = find_segments(tensors, held, np.concatenate(known))
    sets = list(held.sets)
    segments = _add_empty(world, segments, sets)
    told = _keep_first_holder(segments, sets, rule)
    grid_bytes, grid_entries = _grid_loads(world, families)
    shares = share_out(tensors, told, sets, grid_bytes)
    return _lay_out(
        world,
        _Decided(segments, told, sets, shares, rule, families, grid_bytes, grid_entries),
        max_shard_bytes=max_shard_bytes,
    )


def _add_empty(world: World, segments: Segments, sets: list[np.ndarray]) -> Segments:
    """Of a tensor without elements, the first rank that has it stores the whole (empty) box."""
    tensor, rank, item = world.empty.T
    count, offset = len(tensor), len(segments.tensor)
    first_set = len(sets)
    sets += [np.array([number]) for number in rank.tolist()]
    none = np.zeros(count, np.int64)

    def join(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.concatenate([old, new])

    return Segments(
        join(segments.tensor, tensor),
        join(segments.start, np.zeros((count, world.tensors.width), np.int64)),
        join(segments.stop, world.tensors.shape[tensor]),
        join(segments.first, none),
        join(segments.size, none),
        join(segments.pair_segment, offset + np.arange(count)),
        join(segments.pair_holders, first_set + np.arange(count)),
        join(segments.pair_item, item),
        join(segments.pair_source, none),
    )


def _keep_first_holder(segments: Segments, sets: list[np.ndarray], rule: np.ndarray) -> Segments:
    """Under "rank0", only the lowest rank that holds a segment counts."""
    one = rule[segments.tensor[segments.pair_segment]] == REPLICA_RULES.index("rank0")
    if not one.any():
        return segments
    lowest = np.array([found[0] for found in sets], np.int64)
    rank = lowest[segments.pair_holders]
    order = np.lexsort((rank, segments.pair_segment))
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.diff(segments.pair_segment[order]) > 0
    first = np.zeros(len(order), bool)
    first[order] = is_first
    keep = np.flatnonzero(~one | first)
    alone = np.unique(rank[one & first])
    place = len(sets) + np.arange(len(alone))
    sets += [np.array([number]) for number in alone.tolist()]
    holders = segments.pair_holders.copy()
    holders[one & first] = place[np.searchsorted(alone, rank[one & first])]
    return Segments(
        segments.tensor,
        segments.start,
        segments.stop,
        segments.first,
        segments.size,
        segments.pair_segment[keep],
        holders[keep],
        segments.pair_item[keep],
        segments.pair_source[keep],
    )


def _grid_loads(world: World, families: list[Family]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes that each rank stores of the families, and those of their entries."""
    load = np.zeros(world.ranks, np.int64)
    entries = np.zeros(world.ranks, np.int64)
    for family in families:
        for replica in np.unique(family.replica).tolist():
            ranks = family.holders[:, replica]
            mine = family.tensor[family.replica == replica]
            load[ranks] += family.cell_bytes(world.tensors, of_replica=replica)
            entries[ranks] += _entry_bytes(world.tensors)[mine].sum()
    return load, entries


def _entry_bytes(tensors: Tensors) -> np.ndarray:
    """Estimate generously the JSON of an entry of each tensor in a shard file's header."""
    name_bytes = np.array(list(map(len, tensors.names)), np.int64)
    # Names may need escapes, numbers have up to 20 digits.
    return 6 * name_bytes + 160 + 66 * tensors.ndim.astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Decided:
    """What was decided before it is laid out in files.

    Attributes:
        segments: All, with all their holders.
        told: With the holders that count.
        sets: The sets of ranks.
        shares: Who stores what of them.
        rule: (tensors,) the replicas' rules.
        families: The grids.
        grid_bytes: (ranks,) bytes of the grids.
        grid_entries: (ranks,) bytes of their entries in headers.
    """

    segments: Segments
    told: Segments
    sets: list[np.ndarray]
    shares: Shares
    rule: np.ndarray
    families: list[Family]
    grid_bytes: np.ndarray
    grid_entries: np.ndarray


def _lay_out(world: World, decided: _Decided, *, max_shard_bytes: int) -> WritePlan | None:
    """Turn shares into boxes, files, and each rank's part."""
    tensors, ranks, told = world.tensors, world.ranks, decided.told
    boxes = _boxes(told, decided.shares)
    size_bytes = (boxes.stop - boxes.start).prod(axis=1) * tensors.itemsize[boxes.tensor]
    in_file = order_in_file(boxes.rank, tensors.itemsize[boxes.tensor], boxes.tensor)
    others = world.has_values | (decided.grid_entries > 0)
    file, file_rank = _files(
        boxes.rank[in_file],
        size_bytes[in_file],
        _entry_bytes(tensors)[boxes.tensor[in_file]],
        others,
        max_shard_bytes,
    )
    rank_bytes = decided.grid_bytes.copy()
    np.add.at(rank_bytes, boxes.rank, size_bytes)
    if decided.families:
        entries = decided.grid_entries.copy()
        np.add.at(entries, boxes.rank, _entry_bytes(tensors)[boxes.tensor])
        has_grid = decided.grid_entries > 0
        if (
            (np.bincount(file_rank, minlength=ranks)[has_grid] > 1).any()
            or (rank_bytes[has_grid] > max_shard_bytes).any()
            or (entries[has_grid] > _HEADER_LIMIT_BYTES).any()
        ):
            return None
    box_file = np.empty(len(file), np.int64)
    box_file[in_file] = file
    last_file = np.searchsorted(file_rank, np.arange(ranks), side="right") - 1
    layout, layouts = _layouts(tensors, boxes, box_file)
    _grid_layouts(tensors, decided.families, last_file, layout, layouts)
    layout, layouts = _in_order(layout, layouts)
    checks, check_first, check_tensor, grid_checks = _checks(decided)
    rows = RowTable(
        boxes.rank[in_file],
        boxes.item[in_file],
        boxes.tensor[in_file],
        boxes.source[in_file],
        boxes.start[in_file],
        boxes.stop[in_file],
        file,
    )
    blob_file = np.where(world.has_values, last_file, -1)
    tables = PartTables(
        world.template,
        world.templates,
        rows,
        checks,
        GridTable(decided.families, grid_checks),
        blob_file,
        np.where(decided.grid_entries > 0, last_file, -1),
        decided.sets,
    )
    return WritePlan(
        tensors.names,
        tensors.dtype,
        layout,
        layouts,
        len(file_rank),
        file_rank,
        blob_file,
        rank_bytes,
        world.per_rank,
        check_first,
        check_tensor,
        tables,
    )


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Boxes to be stored, in the order of tensor and start; columns as in `RowTable`."""

    tensor: np.ndarray
    rank: np.ndarray
    item: np.ndarray
    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def _boxes(told: Segments, shares: Shares) -> _Boxes:
    item = told.pair_item[shares.pair]
    source = told.pair_source[shares.pair] + shares.begin
    # Whole boxes stay; the others, and runs, are runs of their box and are cut into boxes.
    parent_start, parent_stop = told.start[shares.segment], told.stop[shares.segment]
    low = told.first[shares.segment] + shares.begin
    high = told.first[shares.segment] + shares.end
    extent = parent_stop - parent_start
    complete = (low == 0) & (high == extent.prod(axis=1))
    cut = np.flatnonzero(~complete)
    of, box_start, box_stop = boxes_of_runs(extent[cut], low[cut], high[cut])
    share = np.concatenate([np.flatnonzero(complete), cut[of]])
    start = np.concatenate([parent_start[complete], box_start + parent_start[cut[of]]])
    stop = np.concatenate([parent_stop[complete], box_stop + parent_start[cut[of]]])
    # A box begins in its item's C order where its share does, plus the share's boxes before it.
    sizes = (box_stop - box_start).prod(axis=1)
    before = np.cumsum(sizes) - sizes
    inside = before - before[np.searchsorted(of, of)]
    inside = np.concatenate([np.zeros(len(share) - len(of), np.int64), inside])
    tensor = told.tensor[shares.segment[share]]
    order = np.lexsort((*start.T[::-1], tensor))
    share = share[order]
    return _Boxes(
        tensor[order],
        shares.rank[share],
        item[share],
        source[share] + inside[order],
        start[order],
        stop[order],
    )


def _files(
    rank: np.ndarray,
    size_bytes: np.ndarray,
    entry_bytes: np.ndarray,
    others: np.ndarray,
    max_shard_bytes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Number the files: one a rank that has anything to write, more where one would grow too large.

    The boxes come in the order in which they lie in the files; *others* says which ranks have
    something to write besides.

    Returns:
        Each box's file, and each file's rank.
    """
    new = np.zeros(len(rank), bool)
    new[:1] = True
    new[1:] = rank[1:] != rank[:-1]
    size_total, entry_total = np.cumsum(size_bytes), np.cumsum(entry_bytes)
    begins = np.flatnonzero(new)
    ends = np.append(begins, len(rank))[1:]
    # Nearly always none: only the ranks whose boxes don't fit into one file are looked at.
    whole = size_total[ends - 1] - size_total[begins] + size_bytes[begins]
    entries = entry_total[ends - 1] - entry_total[begins] + entry_bytes[begins]
    large = np.flatnonzero((whole > max_shard_bytes) | (entries > _HEADER_LIMIT_BYTES))
    for begin, stop in zip(begins[large].tolist(), ends[large].tolist(), strict=True):
        at = begin
        while at < stop:  # once a file
            size_before = size_total[at] - size_bytes[at]
            entry_before = entry_total[at] - entry_bytes[at]
            end = min(
                stop,
                int(np.searchsorted(size_total, size_before + max_shard_bytes, side="right")),
                int(np.searchsorted(entry_total, entry_before + _HEADER_LIMIT_BYTES, side="right")),
            )
            at = max(end, at + 1)  # a box larger than the limit still has to go somewhere
            if at < stop:
                new[at] = True
    ranks_of_files = rank[new]
    file_rank = np.sort(
        np.concatenate([ranks_of_files, np.setdiff1d(np.flatnonzero(others), ranks_of_files)])
    )
    number = np.flatnonzero(np.isin(file_rank, ranks_of_files))
    return number[np.cumsum(new) - 1], file_rank


def _layouts(tensors: Tensors, boxes: _Boxes, file: np.ndarray) -> tuple[np.ndarray, list[Layout]]:
    """Make the layouts of the tensors that have boxes, each distinct one once."""
    index = np.full(len(tensors.names), -1)
    used, begins = np.unique(boxes.tensor, return_index=True)
    edges = np.append(begins, len(boxes.tensor))
    count = np.repeat(used, np.diff(edges))
    content = np.column_stack(
        [tensors.shape[count], tensors.ndim[count], boxes.start, boxes.stop, file]
    )
    firsts, kind = distinct_lists(hash_rows(content).view(np.int64), edges)
    # What the hashes say is verified: by the rows themselves.
    model = np.repeat(edges[firsts][kind] - edges[:-1], np.diff(edges)) + np.arange(len(content))
    if not np.array_equal(content[model], content):
        firsts, kind = np.arange(len(used)), np.arange(len(used))
    index[used] = kind
    layouts = []
    for number in firsts.tolist():
        rows = slice(edges[number], edges[number + 1])
        tensor = int(used[number])
        pad = tensors.width - int(tensors.ndim[tensor])
        layouts.append(
            Layout(
                tensors.true_shape(tensor),
                boxes.start[rows, pad:].copy(),
                boxes.stop[rows, pad:].copy(),
                file[rows].copy(),
            )
        )
    return index, layouts


def _grid_layouts(
    tensors: Tensors,
    families: Sequence[Family],
    file_of_rank: np.ndarray,
    layout: np.ndarray,
    layouts: list[Layout],
) -> None:
    """Add the layouts of the families' tensors; *layout* takes their numbers."""
    for family in families:
        known: dict[tuple[object, ...], int] = {}
        for tensor, replica in zip(family.tensor.tolist(), family.replica.tolist(), strict=True):
            shape = tensors.true_shape(tensor)
            if (shape, replica) not in known:
                known[shape, replica] = len(layouts)
                files = file_of_rank[family.holders[:, replica]]
                pad = tensors.width - len(shape)
                layouts.append(family.cells.layout(shape, pad, files))
            layout[tensor] = known[shape, replica]


def _in_order(layout: np.ndarray, layouts: list[Layout]) -> tuple[np.ndarray, list[Layout]]:
    """Number the layouts in the order of the tensors that use them."""
    found, first = np.unique(layout, return_index=True)
    found = found[np.argsort(first)]
    place = np.empty(len(layouts), np.int64)
    place[found] = np.arange(len(found))
    return place[layout], [layouts[number] for number in found.tolist()]


def _checks(
    decided: _Decided,
) -> tuple[CheckTable, np.ndarray, np.ndarray, list[np.ndarray]]:
    """List what must be compared.

    Returns:
        The pairs that take part; the first number of each tensor's stretch of comparisons, and the
        tensor; and for each family the number of each tensor's first one, or -1.
    """
    segments, rule = decided.segments, decided.rule
    members = np.array([len(found) for found in decided.sets], np.int64)
    held = np.zeros(len(segments.tensor), np.int64)
    np.add.at(held, segments.pair_segment, members[segments.pair_holders])
    check = REPLICA_RULES.index("check")
    checked = (held > 1) & (rule[segments.tensor] == check) & (segments.size > 0)
    number = np.cumsum(checked) - 1
    pairs = np.flatnonzero(checked[segments.pair_segment])
    of = segments.pair_segment[pairs]
    table = CheckTable(
        segments.pair_holders[pairs],
        segments.pair_item[pairs],
        segments.pair_source[pairs],
        segments.size[of],
        number[of],
    )
    count = int(checked.sum())
    firsts, tensors, bases = [np.arange(count)], [segments.tensor[checked]], []
    for family in decided.families:
        cells, replicas = family.holders.shape
        compared = (rule[family.tensor] == check) & (replicas > 1)
        base = count + cells * (np.cumsum(compared) - 1)
        firsts.append(base[compared])
        tensors.append(family.tensor[compared])
        bases.append(np.where(compared, base, -1))
        count += cells * int(compared.sum())
    return table, np.concatenate(firsts), np.concatenate(tensors), bases
