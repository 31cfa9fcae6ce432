"""How often the loops of a compiled module run."""

from __future__ import annotations

import re

from fm4m.aot.hlo import Computation, Instruction, Module

_FORWARDS = ("bitcast", "copy", "convert", "copy-done", "opt-barrier", "optimization-barrier", "reshape")


def trip_count(module: Module, outer: Computation, loop: Instruction) -> int | None:
    """Iterations of a while instruction of the computation ``outer``; None if they depend on data.

    Taken from XLA's own note, or else from the condition ``index < bound``: the bound must be a constant there or where
    the loop starts, the index must start at a constant and grow by a constant.
    """
    if match := re.search(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)', loop.attributes):
        return int(match[1])
    condition = module.computations[loop.called("condition")]
    compare = _comparison(module, condition)
    if compare is None:
        return None
    where, instruction, bindings = compare
    direction = re.search(r"direction=(\w+)", instruction.attributes)
    left, right = (_origin(module, where, name, bindings) for name in instruction.operands)
    if direction and direction[1] in ("GT", "GE"):
        left, right = right, left
    start, bound = _initial(module, outer, loop, left), _initial(module, outer, loop, right)
    if direction is None or direction[1] in ("EQ", "NE") or start is None or bound is None:
        return None
    step = _step(module, loop, left) or 1
    count = -(-(bound - start) // step) if direction[1] in ("LT", "GT") else (bound - start) // step + 1
    return max(count, 0)


def _comparison(module: Module, condition: Computation):
    """(computation, compare instruction, what its parameters are bound to) behind the condition's root."""
    root, bindings = condition.root, None
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls")]
        bindings = condition, root
        return (inner, inner.root, bindings) if inner.root.opcode == "compare" else None
    return (condition, root, bindings) if root.opcode == "compare" else None


def _origin(module: Module, where: Computation, name: str, bindings) -> int | tuple[str, int] | None:
    """A constant's value, or ("carried", k): element k of the loop's state."""
    i = where.by_name.get(name)
    while i is not None and i.opcode in _FORWARDS and i.operands:
        i = where.by_name.get(i.operands[0])
    if i is None:
        return None
    if i.opcode == "constant":
        return int(i.arguments) if re.fullmatch(r"-?\d+", i.arguments) else None
    if i.opcode == "get-tuple-element":
        return "carried", int(re.search(r"index=(\d+)", i.attributes)[1])
    if i.opcode == "parameter" and bindings is not None:
        outer, fusion = bindings
        return _origin(module, outer, fusion.operands[int(i.arguments)], None)
    return None


def _initial(module: Module, outer: Computation, loop: Instruction, origin) -> int | None:
    """The value of a constant or of an element of the state when the loop starts."""
    if not isinstance(origin, tuple):
        return origin
    state = outer.by_name.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or origin[1] >= len(state.operands):
        return None
    value = _origin(module, outer, state.operands[origin[1]], None)
    return value if isinstance(value, int) else None


def _step(module: Module, loop: Instruction, origin) -> int | None:
    """What the body adds to an element of the state."""
    if not isinstance(origin, tuple):
        return None
    body = module.computations[loop.called("body")]
    if body.root.opcode != "tuple" or origin[1] >= len(body.root.operands):
        return None
    update = body.by_name.get(body.root.operands[origin[1]])
    if update is None or update.opcode != "add":
        return None
    values = [_origin(module, body, name, None) for name in update.operands]
    return next((v for v in values if isinstance(v, int)), None)
