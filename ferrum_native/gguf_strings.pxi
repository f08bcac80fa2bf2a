# Splits GGUF string arrays apart: `count` times a little-endian uint64 byte length, then that many UTF-8 bytes.
# Every length is checked against the bytes left before it is used, so a damaged array is a ValueError with its index.

from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcpy


cdef struct StringCursor:
    const unsigned char* at     # the next unread byte
    const unsigned char* end    # one past the last byte of the buffer


cdef StringCursor open_strings(const unsigned char[::1] data, Py_ssize_t offset, Py_ssize_t count) except *:
    """A cursor at `offset`, after checking that `count` strings, were they all empty, fit the bytes left."""
    cdef StringCursor cursor
    cdef Py_ssize_t size = data.shape[0]
    if offset < 0 or offset > size or count < 0:
        raise ValueError(f"offset {offset} and count {count} do not lie in a buffer of {size} bytes")
    if count > (size - offset) // 8:
        raise ValueError(f"{count} strings need at least 8 bytes each, {size - offset} bytes are left")
    cursor.at = cursor.end = NULL
    if size > 0:
        cursor.at = &data[0] + offset
        cursor.end = &data[0] + size
    return cursor


cdef Py_ssize_t next_string(StringCursor* cursor, Py_ssize_t index) except -1:
    """Byte length of the string at the cursor, which moves to its first byte."""
    cdef uint64_t length
    cdef Py_ssize_t left = cursor.end - cursor.at
    if left < 8:
        raise ValueError(f"string {index} has no room for its length: {left} bytes are left")
    memcpy(&length, cursor.at, 8)
    cursor.at += 8
    if length > <uint64_t>(left - 8):
        raise ValueError(f"string {index} claims {length} bytes, {left - 8} are left")
    return <Py_ssize_t>length


cdef str decode_utf8(const unsigned char* bytes_at, Py_ssize_t length, Py_ssize_t index):
    """The string of `length` UTF-8 bytes; ValueError with `index` where they are not UTF-8."""
    try:
        return PyUnicode_DecodeUTF8(<const char*>bytes_at, length, NULL)
    except UnicodeDecodeError as error:
        raise ValueError(f"string {index} is not UTF-8 ({error.reason} at its byte {error.start})") from None


def skip_strings(const unsigned char[::1] data, Py_ssize_t offset, Py_ssize_t count):
    """Offset after `count` strings that start at `offset`; ValueError where they run out of bytes."""
    cdef StringCursor cursor = open_strings(data, offset, count)
    cdef const unsigned char* start = cursor.at
    cdef Py_ssize_t index
    for index in range(count):
        cursor.at += next_string(&cursor, index)
    return offset + (cursor.at - start)


def split_strings(const unsigned char[::1] data, Py_ssize_t offset, Py_ssize_t count):
    """(list of `count` str, offset after them); ValueError where bytes run out or are not UTF-8."""
    cdef StringCursor cursor = open_strings(data, offset, count)
    cdef const unsigned char* start = cursor.at
    cdef Py_ssize_t index, length
    cdef str text
    cdef list strings = PyList_New(count)
    for index in range(count):
        length = next_string(&cursor, index)
        text = decode_utf8(cursor.at, length, index)
        Py_INCREF(text)
        PyList_SET_ITEM(strings, index, text)
        cursor.at += length
    return strings, offset + (cursor.at - start)


def split_merges(const unsigned char[::1] data, Py_ssize_t offset, Py_ssize_t count):
    """(list of `count` pairs of str, offset after them) from strings "left right".

    ValueError where bytes run out, are not UTF-8, or a string is not two parts around its first space.
    """
    cdef StringCursor cursor = open_strings(data, offset, count)
    cdef const unsigned char* start = cursor.at
    cdef const unsigned char* space
    cdef Py_ssize_t index, length, left
    cdef tuple pair
    cdef list pairs = PyList_New(count)
    for index in range(count):
        length = next_string(&cursor, index)
        space = <const unsigned char*>memchr(cursor.at, b' ', length) if length > 0 else NULL
        left = space - cursor.at if space != NULL else 0
        if left == 0 or left + 1 == length:
            raise ValueError(f"string {index} is not two parts with a space between them")
        pair = (decode_utf8(cursor.at, left, index), decode_utf8(space + 1, length - left - 1, index))
        Py_INCREF(pair)
        PyList_SET_ITEM(pairs, index, pair)
        cursor.at += length
    return pairs, offset + (cursor.at - start)
