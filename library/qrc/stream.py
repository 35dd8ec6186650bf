"""The state of a stream as a text that a client keeps: checked for damage and for the model that it is of."""

import base64
import binascii
import math
import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from library.errors import InputError

HEAD = struct.Struct("<4s6sddI")  # mark, model, hours, loss, rows
MARK = b"QRC1"
CHECK_BYTES = 16


@dataclass(frozen=True)
class Stream:
    """Where a series stands: its `state` (numbers of the reservoir), the time of its last row, and what has gathered.

    hours   of the last row since 1970-01-01 UTC
    loss    g/m2 since the stream began
    rows    shown since the stream began
    """

    state: np.ndarray
    hours: float
    loss: float
    rows: int


def packed(stream: Stream, model: str) -> str:
    """The text of a stream; `model` is its artifact's version, twelve hexadecimal digits.

    Its length depends on the reservoir alone, not on how long the stream is.
    """
    head = HEAD.pack(MARK, bytes.fromhex(model), stream.hours, stream.loss, min(stream.rows, 2**32 - 1))
    content = head + np.ascontiguousarray(stream.state, "<f8").tobytes()
    return base64.urlsafe_b64encode(content + _check(content)).decode()


def unpacked(text: str, model: str, size: int) -> Stream:
    """The stream of a text. Raises InputError for one that is damaged, of another model, or of another size.

    >>> text = packed(Stream(np.array([0.5]), 24.0, 0.0, 3), "0123456789ab")
    >>> unpacked(text, "0123456789ab", 1).rows
    3
    """
    try:
        content = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise InputError("not a state that this endpoint gave") from error
    if len(content) < HEAD.size + CHECK_BYTES or not content.startswith(MARK):
        raise InputError("not a state that this endpoint gave")
    content, check = content[:-CHECK_BYTES], content[-CHECK_BYTES:]
    if check != _check(content):
        raise InputError("damaged; send back what was answered, unchanged")
    _, version, hours, loss, rows = HEAD.unpack_from(content)
    if version.hex() != model:
        raise InputError(f"of model {version.hex()}, this one is {model}; begin the stream anew")
    state = np.frombuffer(content, "<f8", offset=HEAD.size)
    if len(state) != size or not (np.isfinite(state).all() and math.isfinite(hours) and math.isfinite(loss)):
        raise InputError("not a state of this model's reservoirs")
    return Stream(state.astype(np.float64), hours, loss, rows)


def _check(content: bytes) -> bytes:
    return blake2b(content, digest_size=CHECK_BYTES, person=b"prism-qrc-state").digest()
