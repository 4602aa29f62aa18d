from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GridRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BALANCED: _ClassVar[GridRule]
    CEILING: _ClassVar[GridRule]
BALANCED: GridRule
CEILING: GridRule

class Manifest(_message.Message):
    __slots__ = ("save_id", "created_ns", "ranks", "block_bytes", "step", "tensors", "layouts", "files", "values", "per_rank", "metadata", "metrics")
    SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PER_RANK_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    save_id: int
    created_ns: int
    ranks: int
    block_bytes: int
    step: int
    tensors: Tensors
    layouts: Layouts
    files: Files
    values: Values
    per_rank: PerRank
    metadata: Value
    metrics: Value
    def __init__(self, save_id: _Optional[int] = ..., created_ns: _Optional[int] = ..., ranks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., step: _Optional[int] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ..., layouts: _Optional[_Union[Layouts, _Mapping]] = ..., files: _Optional[_Union[Files, _Mapping]] = ..., values: _Optional[_Union[Values, _Mapping]] = ..., per_rank: _Optional[_Union[PerRank, _Mapping]] = ..., metadata: _Optional[_Union[Value, _Mapping]] = ..., metrics: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("suffix", "shared", "dtype", "layout")
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    suffix: _containers.RepeatedScalarFieldContainer[str]
    shared: _containers.RepeatedScalarFieldContainer[int]
    dtype: _containers.RepeatedScalarFieldContainer[int]
    layout: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, suffix: _Optional[_Iterable[str]] = ..., shared: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Iterable[int]] = ..., layout: _Optional[_Iterable[int]] = ...) -> None: ...

class Layouts(_message.Message):
    __slots__ = ("ndim", "shape", "boxes", "start", "extent", "file", "parts", "rule", "file_base", "file_stride")
    NDIM_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    FILE_BASE_FIELD_NUMBER: _ClassVar[int]
    FILE_STRIDE_FIELD_NUMBER: _ClassVar[int]
    ndim: _containers.RepeatedScalarFieldContainer[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    boxes: _containers.RepeatedScalarFieldContainer[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    extent: _containers.RepeatedScalarFieldContainer[int]
    file: _containers.RepeatedScalarFieldContainer[int]
    parts: _containers.RepeatedScalarFieldContainer[int]
    rule: _containers.RepeatedScalarFieldContainer[GridRule]
    file_base: _containers.RepeatedScalarFieldContainer[int]
    file_stride: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ndim: _Optional[_Iterable[int]] = ..., shape: _Optional[_Iterable[int]] = ..., boxes: _Optional[_Iterable[int]] = ..., start: _Optional[_Iterable[int]] = ..., extent: _Optional[_Iterable[int]] = ..., file: _Optional[_Iterable[int]] = ..., parts: _Optional[_Iterable[int]] = ..., rule: _Optional[_Iterable[_Union[GridRule, str]]] = ..., file_base: _Optional[_Iterable[int]] = ..., file_stride: _Optional[_Iterable[int]] = ...) -> None: ...

class Files(_message.Message):
    __slots__ = ("length", "data_start", "digest")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DATA_START_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    length: _containers.RepeatedScalarFieldContainer[int]
    data_start: _containers.RepeatedScalarFieldContainer[int]
    digest: bytes
    def __init__(self, length: _Optional[_Iterable[int]] = ..., data_start: _Optional[_Iterable[int]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: _containers.RepeatedScalarFieldContainer[str]
    value: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, name: _Optional[_Iterable[str]] = ..., value: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class PerRank(_message.Message):
    __slots__ = ("name", "length", "file")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    name: _containers.RepeatedScalarFieldContainer[str]
    length: _containers.RepeatedScalarFieldContainer[int]
    file: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[_Iterable[str]] = ..., length: _Optional[_Iterable[int]] = ..., file: _Optional[_Iterable[int]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("null", "boolean", "integer", "big_integer", "real", "text", "raw", "list", "tuple", "dict", "array")
    NULL_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    BIG_INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    null: bool
    boolean: bool
    integer: int
    big_integer: bytes
    real: float
    text: str
    raw: bytes
    list: List
    tuple: List
    dict: Dict
    array: Array
    def __init__(self, null: bool = ..., boolean: bool = ..., integer: _Optional[int] = ..., big_integer: _Optional[bytes] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., raw: _Optional[bytes] = ..., list: _Optional[_Union[List, _Mapping]] = ..., tuple: _Optional[_Union[List, _Mapping]] = ..., dict: _Optional[_Union[Dict, _Mapping]] = ..., array: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class List(_message.Message):
    __slots__ = ("item",)
    ITEM_FIELD_NUMBER: _ClassVar[int]
    item: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, item: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Dict(_message.Message):
    __slots__ = ("key", "item")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    key: _containers.RepeatedCompositeFieldContainer[Value]
    item: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, key: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., item: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "offset")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    dtype: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    def __init__(self, dtype: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ...) -> None: ...
