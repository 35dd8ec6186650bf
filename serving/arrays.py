"""Arrays and tables that came as bytes: read without pickle, and never larger than the bytes that came.

Whatever the bytes claim about their size is compared with their length before anything is allocated.
"""

import ast
import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from library.errors import InputError

if TYPE_CHECKING:
    import pyarrow

NUMBERS = re.compile(r"[<>|=](?:f[248]|[iu][1248]|b1)")
LONGEST_HEADER = 10_000
HEAD = LONGEST_HEADER + 12  # and what stands before it
MOST_DIMENSIONS = 32
COMPRESSION = 3  # number of the field in Arrow's RecordBatch
DEPTH = 2  # levels of lists, where there may be any
PLAIN_TYPES = ("floating", "integer", "string", "large_string", "binary", "large_binary", "timestamp")


def npy(content: bytes, name: str = "body") -> np.ndarray:
    """The array of a NumPy file, without a copy; read only. Raises InputError about the field `name`."""
    start, dtype, order, shape = _described(content, name)
    there, needed = len(content) - start, dtype.itemsize
    for side in shape:  # in Python's integers, which do not overflow
        needed *= side
    if there != needed:
        raise InputError(f"{name}: the array needs {needed} bytes, {there} are there")
    if not needed:
        raise InputError(f"{name}: the array is empty")
    flat = np.frombuffer(content, dtype, offset=start)
    return flat.reshape(shape, order="F" if order else "C").astype(dtype.newbyteorder("="), copy=False)


def npy_shape(content: bytes, name: str = "body") -> tuple[int, ...]:
    """What a NumPy file's head says of its shape; its first `HEAD` bytes are enough. Raises InputError."""
    return _described(content, name)[-1]


def _described(content: bytes, name: str) -> tuple[int, np.dtype, bool, tuple[int, ...]]:
    """Where the numbers begin, their type, whether columns come first, and the shape."""
    start, header = _header(content, name)
    try:
        described = ast.literal_eval(header.strip())
        kind, order, shape = (described[key] for key in ("descr", "fortran_order", "shape"))
        plain = isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 1 << 63 for side in shape)
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise InputError(f"{name}: not a NumPy file (.npy)") from error
    if not isinstance(kind, str) or not NUMBERS.fullmatch(kind):
        raise InputError(f"{name}: an array of numbers is needed, this is one of {str(kind)[:80]}")
    if not plain or len(shape) > MOST_DIMENSIONS:
        raise InputError(f"{name}: not a NumPy file (.npy): its shape is no tuple of at most {MOST_DIMENSIONS} sizes")
    return start, np.dtype(kind), bool(order), shape


def _header(content: bytes, name: str) -> tuple[int, str]:
    """Where the numbers begin, and the text before them that describes them."""
    form = {1: "<H", 2: "<I", 3: "<I"}.get(content[6] if len(content) > 6 else 0)
    if form is None or not content.startswith(b"\x93NUMPY"):
        raise InputError(f"{name}: not a NumPy file (.npy)")
    begin = 8 + struct.calcsize(form)
    length = struct.unpack_from(form, content, 8)[0] if len(content) >= begin else LONGEST_HEADER + 1
    if length > LONGEST_HEADER:
        raise InputError(f"{name}: not a NumPy file (.npy)")
    return begin + length, content[begin : begin + length].decode("latin-1")


def table(content: bytes, *, nested: bool = False) -> "pyarrow.Table":
    """The table of an Arrow stream; its columns hold numbers or texts or, with `nested`, lists of them or of such.

    Raises InputError.
    """
    import pyarrow

    try:
        for message in pyarrow.ipc.MessageReader.open_stream(pyarrow.BufferReader(content)):
            if message.type == "dictionary" or (message.type == "record batch" and _compressed(message.metadata)):
                raise InputError("body: an Arrow stream without compression and dictionaries is needed")
        found = pyarrow.ipc.open_stream(pyarrow.BufferReader(content)).read_all()
        for field in found.schema:
            if not _is_plain(field.type, DEPTH if nested else 0):
                read = "numbers, texts and lists of them" if nested else "numbers and texts"
                raise InputError(f"body: column {field.name[:64]} is of {str(field.type)[:80]}; {read} are read")
        found.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("body: not a whole Arrow IPC stream") from error
    if not found.num_rows or not found.num_columns:
        raise InputError("body: the table is empty")
    return found


def _is_plain(kind: "pyarrow.DataType", depth: int) -> bool:
    """Whether a column of it holds no more than its bytes: numbers and texts, or at most `depth` levels of lists."""
    from pyarrow import types

    if any(getattr(types, f"is_{name}")(kind) for name in PLAIN_TYPES):
        return True
    return depth > 0 and is_list(kind) and _is_plain(kind.value_type, depth - 1)


def is_list(kind: "pyarrow.DataType") -> bool:
    """Whether a column of it holds lists; fixed ones of no length, of which bytes say nothing, are none."""
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or (types.is_fixed_size_list(kind) and kind.list_size > 0)


def _compressed(metadata: Any) -> bool:
    """Whether a record batch is: whether its flatbuffer, at Message.header, has the field for it."""
    data = memoryview(metadata)

    def field(place: int, number: int) -> int:
        """Where a field of the table at `place` is; 0 when it is left out."""
        layout = place - struct.unpack_from("<i", data, place)[0]
        if 4 + 2 * number + 2 > struct.unpack_from("<H", data, layout)[0]:
            return 0
        offset = struct.unpack_from("<H", data, layout + 4 + 2 * number)[0]
        return place + offset if offset else 0

    message = struct.unpack_from("<I", data, 0)[0]
    header = field(message, 2)
    batch = header + struct.unpack_from("<I", data, header)[0]
    return field(batch, COMPRESSION) != 0
