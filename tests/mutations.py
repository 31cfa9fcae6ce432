"""What can be wrong with a file: damaged bytes, and JSON whose values, keys and shape are other ones."""

from __future__ import annotations

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SCALE = int(os.environ.get("FM4M_FUZZ", "1"))


def fuzz(examples: int):
    """Settings of a fuzzing test: always the same examples, unless FM4M_FUZZ asks for that many times as many."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=SCALE == 1,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


JUNK = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 7, 0.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "1",
     "../../x", "/etc/passwd", "a/b", ".", "..", "\x00", "é" * 3, "x" * 5000, [], {}, [[]], [1, 2, 3], {"a": 1},
     [1e30, -5], [[1, 2], [3]], {"name": "x"}]
).map(copy.deepcopy)  # fmt: skip


def places(value, path=()):
    """The paths of all values within a JSON value, the outermost first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


@st.composite
def changed(draw, value, most=3):
    """A JSON value of which one to ``most`` things were replaced, dropped, renamed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(JUNK)
            continue
        *parents, key = path
        holder = value
        for parent in parents:
            holder = holder[parent]
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "rename", "scale", "exchange", "append")))
        if how == "drop":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(("x", "../../x", "", key + "s")))] = holder.pop(key)
        elif how == "scale" and isinstance(holder[key], int):
            holder[key] = holder[key] * draw(st.sampled_from((-1, 2, 10**3, 10**6, 10**12))) + draw(st.integers(-1, 1))
        elif how == "exchange":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
        elif how == "append" and isinstance(holder[key], list):
            holder[key].append(copy.deepcopy(holder[key][0]) if holder[key] else draw(JUNK))
        else:
            holder[key] = draw(JUNK)
    return value


@st.composite
def damaged(draw, data: bytes, same_size: bool = False):
    """Bytes that were cut off, overwritten, flipped, moved or doubled somewhere; mostly where they are not zero."""
    used = [i for i, byte in enumerate(data) if byte] or [0]
    data, length = bytearray(data), len(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.one_of(st.sampled_from(used), st.sampled_from(used), st.integers(0, max(length - 1, 0))))
        size = draw(st.sampled_from((1, 8, 100, 5000)))
        how = draw(st.sampled_from(("cut", "flip", "zero", "random", "move", "insert", "empty")))
        if how == "cut":
            del data[at:]
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif how == "random":
            new = draw(st.binary(min_size=1, max_size=16))
            data[at : at + len(new)] = new
        elif how == "move":
            part = data[at : at + size]
            del data[at : at + size]
            to = draw(st.integers(0, len(data)))
            data[to:to] = part
        elif how == "insert":
            data[at:at] = draw(st.sampled_from((b"\x00", b"{", b"[" * 100_000, b'"', b"\xff\xfe", b"NaN", b"9" * 5000)))
        elif how == "empty" and draw(st.integers(0, 5)) == 0:
            data.clear()
    if same_size:
        data[length:] = b""
        data.extend(bytes(length - len(data)))
    return bytes(data)


@st.composite
def changed_json(draw, value):
    """The bytes of a JSON text: with other values, a key twice, or damaged as bytes are."""
    how = draw(st.sampled_from(("value", "value", "value", "value", "bytes", "twice", "deep")))
    if how == "deep":
        return b'{"a": ' * 100_000
    if how == "value":
        return json.dumps(draw(changed(value))).encode()
    text = json.dumps(value)
    if how == "twice" and isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        return (text[:-1] + f", {json.dumps(key)}: {json.dumps(draw(JUNK))}}}").encode()
    return draw(damaged(text.encode()))
