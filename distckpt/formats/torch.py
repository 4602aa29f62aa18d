"""PyTorch's ``.pt`` and ``.pth`` files, without torch and without running their pickles."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable

from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, Source
from distckpt.formats.base import Place, Wanted, Writing, write_file
from distckpt.formats.torch_pickle import Refused, Stored, leaves
from distckpt.formats.torch_writing import (
    Record,
    archive_bytes,
    archive_records,
    blocks_of,
    check_entries,
    dump,
    fill,
    size_of,
    whole,
)
from distckpt.formats.torch_zip import Archive
from distckpt.region import Region
from distckpt.state import MAX_NAME_BYTES, PLAIN

_LOG = logging.getLogger(__name__)

# How a file of torch.save begins that is older than torch 1.6, and a newer one.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
_HEAD_BYTES = 512
# One place may be many tensors' (tied weights); but not as many as a bomb would have.
_MAX_TIMES = 64


class TorchFormat:
    """A file of ``torch.save``.

    Nested dicts and lists have dotted names; plain values are kept as values. What is neither a
    tensor nor a plain value (a dtype, a device, a set) is left out, and listed in the metadata's
    ``left_out``. Pickles that hold more than weights are refused, and so are tensors that numpy has
    no array for (quantized, sparse, …).
    """

    name = "torch"
    suffixes = (".pt", ".pth", ".bin")

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        head = place.head(_HEAD_BYTES)
        if head.startswith(_ZIP):
            name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
            return name.endswith(b"/data.pkl") or place.name.endswith((".pt", ".pth"))
        if head.startswith(_LEGACY):
            return True
        return place.name.endswith((".pt", ".pth")) and head[:1] == b"\x80"

    def open(self, place: Place) -> Source:
        """See `Format`."""
        head = place.head(len(_LEGACY))
        if not head.startswith(_ZIP[:2]):
            kind = "a pickle" if head[:1] == b"\x80" else "something else"
            old = "a file of torch before 1.6" if head == _LEGACY else kind
            raise UnsupportedFormat(
                f"{place.url}: expected the zip archive of torch.save, found {old}; read it with "
                "torch.load(path, weights_only=True), and torch.save it again"
            )
        return _TorchSource(place)

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """See `Format`. The file has one flat dict of tensors and values; no metadata."""
        check_entries(wanted, "torch")
        stored = [whole(tensor, str(number)) for number, tensor in enumerate(wanted.tensors)]
        names = [tensor.name for tensor in wanted.tensors]
        pickle = dump({**dict(zip(names, stored, strict=True)), **wanted.values})
        storages = [
            Record(f"data/{number}", size_of(tensor), blocks_of(tensor, Region.whole(tensor.shape)))
            for number, tensor in enumerate(wanted.tensors)
        ]
        records = archive_records(pickle, storages)
        total = archive_bytes(records)
        return write_file(place, wanted, total, lambda sink: fill(sink, [records]))


FORMAT = TorchFormat()


class _TorchSource:
    """An opened file of torch.save."""

    def __init__(self, place: Place) -> None:
        self._archive = archive = Archive(place)
        found = leaves(archive.root, place.url, archive.pickle_bytes)
        entries = sorted_out(found, place.url)
        self._tensors: list[Stored] = []
        described = []
        for name, tensor in entries.tensors.items():
            archive.check(name, tensor)
            self._tensors.append(tensor)
            described.append(ForeignTensor(name, tensor.shape, tensor.dtype))
        total = sum(math.prod(each.shape) * each.dtype.itemsize for each in self._tensors)
        if total > _MAX_TIMES * (place.size() + (1 << 20)):
            raise CorruptCheckpoint(
                f"{place.url}: {len(described)} tensors of {total} bytes lie in {place.size()} "
                "bytes: they share one place over and over",
                path=place.url,
            )
        self._contents = Contents(described, entries.values, entries.metadata)

    @property
    def contents(self) -> Contents:
        """See `Source`."""
        return self._contents

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        del piece  # there is one
        self._archive.read_into(self._tensors[tensor], start_byte, buffer)


class Entries:
    """What a pickle holds, by kind; each by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Stored] = {}
        self.values: dict[str, object] = {}
        self.left_out: dict[str, object] = {}

    @property
    def metadata(self) -> dict[str, object]:
        """What was left out, where anything was."""
        return {"left_out": self.left_out} if self.left_out else {}


def sorted_out(
    found: Iterable[tuple[str, object]], where: str, taken: Collection[str] = ()
) -> Entries:
    """Sort leaves of a pickle by kind.

    Args:
        found: Name and leaf of each.
        where: For messages.
        taken: Names that are something else's already.

    Raises:
        UnsupportedFormat: Tensors that can't be had: all of them.
        CorruptCheckpoint: Two of one name.
    """
    entries, refused, seen = Entries(), {}, {*taken}
    for name, leaf in found:
        if name in seen:
            raise CorruptCheckpoint(
                f"{where}: two entries have the name {name!r}: their containers' keys have dots or "
                "differ in type only; rename one and save it again",
                path=where,
            )
        seen.add(name)
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or "\0" in name:
            raise CorruptCheckpoint(f"{where}: a name that is no name: {name[:80]!r}", path=where)
        if isinstance(leaf, Stored):
            entries.tensors[name] = leaf
        elif isinstance(leaf, Refused):
            refused[name] = leaf.what
        elif isinstance(leaf, PLAIN):
            entries.values[name] = leaf
        else:
            entries.left_out[name] = str(leaf)
    if refused:
        lines = "\n  ".join(f"{name!r}: {what}" for name, what in refused.items())
        raise UnsupportedFormat(f"{where}: {len(refused)} tensors can't be read:\n  {lines}")
    if entries.left_out:
        lines = ", ".join(f"{name!r}: {what}" for name, what in entries.left_out.items())
        _LOG.warning("%s: neither tensors nor plain values, and left out: %s", where, lines)
    return entries
