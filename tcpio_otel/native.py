"""The compiled part: passes over a batch that NumPy would make in dozens of steps. native.h says what it does and not.

Its functions let the interpreter go while they run. Arrays are passed as they are: each is checked for the type and the
layout that the function counts on, and lives until it returns.
"""

import ctypes
from ctypes import c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.ctypeslib import ndpointer
from numpy.typing import NDArray

from tcpio_otel.batch import RECORD
from tcpio_otel.errors import EnvironmentFault

STEP = 32
"""TCPIO_STEP: widths of rows are multiples of it, and so many bytes behind the end of an output are written over."""

_X86_64_V3 = {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
"""What x86-64-v3 adds, in the words of /proc/cpuinfo (the psABI's table of micro-architecture levels)."""


def _library() -> Path:
    """The library for this processor: the same code, compiled for those of the last ten years, where it is one."""
    plain = Path(__file__).with_name("libtcpio.so")
    fast = plain.with_name("libtcpio-v3.so")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return plain
    flags = next((line for line in lines if line.startswith("flags")), "")
    return fast if fast.exists() and set(flags.split()) >= _X86_64_V3 else plain


LIBRARY = _library()


def _array(dtype: Any) -> Any:
    return ndpointer(dtype, flags="C_CONTIGUOUS")


_RECORDS, _BYTES, _FLAGS = _array(RECORD), _array(np.uint8), _array(np.bool_)
_INT32, _INT64, _UINT64 = _array(np.int32), _array(np.int64), _array(np.uint64)
_KEYS, _COLUMN64, _COLUMN32 = ndpointer(np.uint64, ndim=2), ndpointer(np.uint64), ndpointer(np.uint32)  # with strides
_COLUMN_INT32 = ndpointer(np.int32)

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "tcpio_hash": (None, [_KEYS, c_size_t, c_size_t, _UINT64]),
    "tcpio_find": (None, [_KEYS, c_size_t, c_size_t, _INT32, c_uint64, _UINT64, _INT64]),
    "tcpio_sift": (c_size_t, [_RECORDS, _INT64, c_size_t, _FLAGS, _COLUMN32, c_size_t, _INT64]),
    "tcpio_count": (None, [_RECORDS, _INT64, c_size_t, _INT64, _INT64, _INT64, _array(np.uint32), _INT64]),
    "tcpio_row_numbers": (
        c_size_t,
        [
            _RECORDS,
            _INT64,
            c_size_t,
            _COLUMN64,
            c_size_t,
            c_size_t,
            _UINT64,
            ndpointer(flags="C_CONTIGUOUS"),
            _INT64,
            _FLAGS,
        ],
    ),
    "tcpio_encode_logs": (
        c_size_t,
        [
            c_void_p,
            _RECORDS,
            _INT64,
            c_void_p,
            c_void_p,
            c_void_p,
            c_void_p,
            c_size_t,
            c_size_t,
            c_size_t,
            c_uint64,
            c_uint64,
            _BYTES,
            _INT64,
        ],
    ),
    "tcpio_arrange": (c_size_t, [_COLUMN_INT32, c_size_t, _INT64, c_size_t, _INT32, _INT32, _INT32, _INT64]),
    "tcpio_follow": (None, [c_void_p, c_void_p, c_void_p, c_size_t, c_void_p]),
    "tcpio_join": (None, [c_void_p, _RECORDS, _INT64, c_size_t, c_void_p]),
    "tcpio_context_layout": (None, [_INT64]),
}


class Rows(ctypes.Structure):
    """`struct tcpio_rows`; whoever fills it in keeps the arrays that it points to."""

    _fields_ = (("bytes", c_void_p), ("lengths", c_void_p), ("width", c_uint64))


def padded(length: int) -> int:
    """The next width that a row can have."""
    return -(-length // STEP) * STEP


def rows_of(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows that hold `texts`: bytes (uint8, shape (n, width)) and lengths (int64, shape (n,))."""
    width = padded(max(map(len, texts)))
    joined = b"".join(text.ljust(width, b"\0") for text in texts)
    return np.frombuffer(joined, np.uint8).reshape(len(texts), width), np.array([len(text) for text in texts], np.int64)


def point(rows: Rows, data: NDArray[Any], lengths: NDArray[np.int64]) -> None:
    """Let `rows` point to arrays, contiguous: `data` has a row of bytes for each item of `lengths`."""
    rows.bytes, rows.lengths = data.ctypes.data, lengths.ctypes.data
    rows.width = data.nbytes // max(1, len(data))


def address(array: NDArray[Any], dtype: np.dtype[Any]) -> int:
    """Where an array lies that C takes for one of `dtype`; ctypes' own check of that takes as long as many records do.

    Raises:
        TypeError: it is something else.
    """
    if (array.dtype is not dtype and array.dtype != dtype) or not array.flags.c_contiguous:
        raise TypeError(f"not a contiguous array of {dtype}: {array.dtype}, strides {array.strides}")
    return array.ctypes.data


def load(path: Path) -> Any:
    """The functions of a library, with their types.

    Raises:
        EnvironmentFault: it is missing, or not for this system.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentFault(f"the compiled part of tcpio-otel does not load ({error}); install it again") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


library: Any = load(LIBRARY)
