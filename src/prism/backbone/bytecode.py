"""Symbolic execution of a function's bytecode (Python 3.10 to 3.13), along all of its paths."""

from __future__ import annotations

import builtins
import dis
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from prism.backbone.symbols import Code, Path, Unclear, Value

if TYPE_CHECKING:
    from prism.backbone.flow import Flow

STEPS, VISITS = 40_000, 64  # limits: instructions in all; visits of one instruction in one call
_NOTHING = {"NOP", "RESUME", "CACHE", "PRECALL", "EXTENDED_ARG", "MAKE_CELL", "COPY_FREE_VARS", "POP_BLOCK"}
_NOTHING |= {"SETUP_ANNOTATIONS", "NOT_TAKEN"}
# Instructions that pop values off the stack and push one, by the number that they pop.
_TAKES = {"GET_ITER": 1, "GET_YIELD_FROM_ITER": 1, "FORMAT_SIMPLE": 1, "CONVERT_VALUE": 1, "FORMAT_WITH_SPEC": 2}
_TAKES |= {"TO_BOOL": 1, "COMPARE_OP": 2, "IS_OP": 2, "CONTAINS_OP": 2, "BINARY_SLICE": 3, "LIST_TO_TUPLE": 1}
_TAKES |= {"CALL_INTRINSIC_1": 1, "CALL_INTRINSIC_2": 2, "IMPORT_NAME": 2, "YIELD_FROM": 2}
_BUILDS = {"BUILD_TUPLE": 1, "BUILD_LIST": 1, "BUILD_SET": 1, "BUILD_MAP": 2, "BUILD_STRING": 1, "BUILD_SLICE": 1}
_DROPS = {"POP_TOP": 1, "DELETE_ATTR": 1, "DELETE_GLOBAL": 0, "DELETE_FAST": 0, "DELETE_DEREF": 0}
_ADDS = {"LIST_APPEND": 1, "SET_ADD": 1, "MAP_ADD": 2, "LIST_EXTEND": 1, "SET_UPDATE": 1, "DICT_UPDATE": 1}
_ADDS |= {"DICT_MERGE": 1}
_ROTATES = {"ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}
_OLD, _VERSION = sys.version_info < (3, 11), sys.version_info[:2]


class _Frame(NamedTuple):
    position: int
    stack: list[Value]
    local: dict[str, Value]
    path: Path
    names: tuple[str, ...]  # keywords of the next call
    visits: dict[int, int]


def paths(flow: Flow, inner: Code, local: dict[str, Value], path: Path, depth: int) -> list[tuple[Value, Path]]:
    """The result and path of each end of a function, by `return`; paths that raise have none."""
    return _Run(flow, inner, depth).all(local, path)


class _Run:
    """One function's instructions, run on symbols along every path."""

    def __init__(self, flow: Flow, inner: Code, depth: int):
        self.flow, self.inner, self.depth = flow, inner, depth
        self.code = list(dis.get_instructions(inner.code))
        self.indices = {each.offset: index for index, each in enumerate(self.code)}
        self.tries: dict[int, list[Any]] = {}
        for entry in getattr(dis.Bytecode(inner.code), "exception_entries", ()):  # from Python 3.11
            if (target := self.indices.get(entry.target)) is not None and not self._of_with(target):
                self.tries.setdefault(self.indices.get(entry.start, -1), []).append((target, entry.depth, entry.lasti))
        self.targets = {index for index, each in enumerate(self.code) if each.is_jump_target}
        self.ends: list[tuple[Value, Path]] = []

    def _of_with(self, target: int) -> bool:
        """True for the handler that leaves a `with` block."""
        return any(each.opname == "WITH_EXCEPT_START" for each in self.code[target : target + 3])

    def all(self, local: dict[str, Value], path: Path) -> list[tuple[Value, Path]]:
        self.ahead = [_Frame(0, [], local, path, (), {})]
        passed: dict[Any, Path] = {}
        counts: dict[int, int] = {}
        while self.ahead:
            frame = self.ahead.pop()
            forks = True
            while frame is not None:
                self.flow.steps += 1
                index = frame.position
                if forks:  # paths that meet again in the same state are merged
                    key = _key(frame)
                    if (first := passed.setdefault(key, frame.path)) is not frame.path:
                        first.join(frame.path)
                        break
                    counts[index] = counts.get(index, 0) + 1
                    if counts[index] > VISITS or self.flow.steps > STEPS:
                        self.flow.capped = True
                        break
                for target, height, last in self.tries.get(index, ()):
                    if -target not in frame.visits:
                        frame.visits[-target] = 1
                        other = frame.path.copy()
                        other.forked = True
                        exception = [self.flow.none] * (2 if last else 1)
                        self._later(frame, target, [*frame.stack[:height], *exception], other)
                frame, forks = self._step(frame)
        return self.ends

    def _later(self, frame: _Frame, index: int, stack: list[Value], path: Path) -> None:
        """Put off another path, which goes on at instruction `index`."""
        self.ahead.append(_Frame(index, stack, dict(frame.local), path, (), dict(frame.visits)))

    def _step(self, frame: _Frame) -> tuple[Any, bool]:
        """The frame after an instruction, or None where the path ends, and whether other paths may reach that frame."""
        flow, (index, stack, local, path, names, visits) = self.flow, frame
        instruction = self.code[index]
        kind, argument, value = instruction.opname, instruction.arg or 0, instruction.argval
        after = index + 1

        def take(count: int) -> list[Value]:
            if count > len(stack):
                raise Unclear
            taken = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return taken

        if kind in _NOTHING:
            pass
        elif kind == "LOAD_CONST":
            stack.append(flow.constant(value))
        elif kind in ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_CLOSURE", "LOAD_FAST_AND_CLEAR"):
            stack.append(self._variable(value, local, path))
        elif kind in ("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"):
            stack.extend(self._variable(name, local, path) for name in value)
        elif kind in ("STORE_FAST", "STORE_FAST_MAYBE_NULL"):
            local[value] = take(1)[0]
        elif kind == "STORE_FAST_STORE_FAST":
            local[value[0]], local[value[1]] = reversed(take(2))
        elif kind == "STORE_FAST_LOAD_FAST":
            local[value[0]] = take(1)[0]
            stack.append(self._variable(value[1], local, path))
        elif kind in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            stack.append(self._variable(value, local, path))
        elif kind == "STORE_DEREF":
            self._store(value, take(1)[0], local, path)
        elif kind == "LOAD_GLOBAL":
            stack.extend(
                [flow.null, self._global(value, path)] if argument & 1 and not _OLD else [self._global(value, path)]
            )
        elif kind == "STORE_GLOBAL":
            flow.written.add((id(self.inner.scope), value))
            path.memory[id(self.inner.scope), value] = take(1)[0]
        elif kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if kind == "LOAD_SUPER_ATTR":
                owner, instance = take(3)[1:]
                stack.append(flow.super(owner, instance))
            attribute = flow.attribute(take(1)[0], value, path, self.depth)
            method = kind == "LOAD_METHOD" or (argument & 1 and _VERSION >= (3, 12))
            stack.extend([flow.null, attribute] if method else [attribute])
        elif kind == "STORE_ATTR":
            new, target = take(2)
            flow.set_attribute(target, value, new, path)
        elif kind == "PUSH_NULL":
            stack.append(flow.null)
        elif kind == "KW_NAMES":
            names = value if isinstance(value, tuple) else self.inner.code.co_consts[argument]
            return _Frame(after, stack, local, path, names, visits), False
        elif kind in ("CALL", "CALL_KW", "CALL_METHOD", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX"):
            return self._call(kind, argument, names, take, frame)
        elif kind == "BINARY_SUBSCR":
            target, key = take(2)
            stack.append(flow.item(target, key, path))
        elif kind == "DELETE_SUBSCR":
            flow.change(path, *take(2))
        elif kind == "STORE_SUBSCR":
            new, target, key = take(3)
            flow.change(path, target, key, new)
            path.memory[target, "[]", key] = new
        elif kind == "STORE_SLICE":
            new, target, *ends = take(4)
            flow.change(path, target, *ends, new)
        elif kind == "BINARY_OP" or kind.startswith(("BINARY_", "INPLACE_")):
            if kind == "BINARY_SLICE":
                stack.append(flow.made(kind, *take(3)))
            else:
                left, right = take(2)
                inplace = kind.startswith("INPLACE_") or (kind == "BINARY_OP" and instruction.argrepr.endswith("="))
                if inplace and (left.inputs or hasattr(left.concrete, "__iadd__")):
                    flow.change(path, left, right)
                stack.append(flow.made((kind.replace("INPLACE", "BINARY"), argument), left, right))
        elif kind in _TAKES or kind.startswith("UNARY_"):
            parts = take(_TAKES.get(kind, 1))
            if kind in ("LIST_TO_TUPLE", "CALL_INTRINSIC_1") and (_OLD or kind == "LIST_TO_TUPLE" or argument == 6):
                stack.append(flow.made("as tuple", *parts))
            elif (
                kind == "GET_ITER" and parts[0].concrete is not flow.missing and hasattr(parts[0].concrete, "__next__")
            ):
                stack.extend(parts)
            elif kind == "IMPORT_NAME":
                stack.append(flow.object(sys.modules[value]) if value in sys.modules else flow.made(("import", value)))
            elif kind in ("TO_BOOL", "GET_ITER") and parts[0].op == "constant":
                stack.extend(parts)
            else:
                stack.append(flow.made((kind, argument), *parts))
        elif kind in _BUILDS:
            parts = take(argument * _BUILDS[kind])
            stack.append(flow.made("build" if kind not in ("BUILD_STRING", "BUILD_SLICE") else kind, *parts))
        elif kind == "BUILD_CONST_KEY_MAP":
            stack.append(flow.made("build", *take(argument + 1)))
        elif kind == "FORMAT_VALUE":
            stack.append(flow.made("str", *take(2 if argument & 4 else 1)))
        elif kind in _ADDS:
            parts = take(_ADDS[kind])
            old = stack[-argument]
            stack[-argument] = flow.made("extended" if kind == "LIST_EXTEND" else "build", old, *parts)
        elif kind in _DROPS:
            take(_DROPS[kind])
        elif kind in ("COPY", "DUP_TOP"):
            stack.append(stack[-(argument or 1)])
        elif kind == "DUP_TOP_TWO":
            stack.extend(stack[-2:])
        elif kind == "SWAP":
            stack[-1], stack[-argument] = stack[-argument], stack[-1]
        elif kind in _ROTATES or kind == "ROT_N":
            stack.insert(len(stack) - _ROTATES.get(kind, argument), stack.pop())
            if len(stack) < _ROTATES.get(kind, argument):
                raise Unclear
        elif kind == "GET_LEN":
            stack.append(flow.made("len", stack[-1]))
        elif kind == "UNPACK_SEQUENCE":
            whole = take(1)[0]
            is_built = whole.op == "build" and len(whole.parts) == argument
            parts = (
                list(whole.parts) if is_built else [flow.item(whole, flow.constant(n), path) for n in range(argument)]
            )
            stack.extend(reversed(parts))
        elif kind == "UNPACK_EX":
            whole, count = take(1)[0], (argument & 0xFF) + (argument >> 8) + 1
            stack.extend(flow.item(whole, flow.constant(("of", n)), path) for n in reversed(range(count)))
        elif kind == "IMPORT_FROM":
            stack.append(flow.attribute(stack[-1], value, path, self.depth))
        elif kind == "LOAD_ASSERTION_ERROR":
            stack.append(flow.object(AssertionError))
        elif kind == "MAKE_FUNCTION":
            self._make(argument, take, frame)
        elif kind == "SET_FUNCTION_ATTRIBUTE":
            defaults, function = take(2)
            stack.append(flow.function(function.parts[0], defaults) if argument == 1 else function)
        elif kind in ("BEFORE_WITH", "SETUP_WITH"):
            context = take(1)[0]
            stack.extend([flow.made("exit"), flow.made("entered", context)])
        elif kind == "SETUP_FINALLY":
            handler, other = self.indices[value], path.copy()
            other.forked = True
            if not self._of_with(handler):
                self._later(frame, handler, [*stack, *[flow.none] * 6], other)
        elif kind == "PUSH_EXC_INFO":
            stack.extend([flow.none, *take(1)])
        elif kind == "CHECK_EXC_MATCH":
            stack.append(flow.made("match", *take(1)))
        elif kind == "POP_EXCEPT":
            take(3 if _OLD else 1)
        elif kind == "RETURN_GENERATOR":
            stack.append(flow.none)
        elif kind == "GEN_START":
            take(1) if stack else None
        elif kind == "YIELD_VALUE":
            local[".yields"] = flow.made("yields", *take(1), *([local[".yields"]] if ".yields" in local else []))
            stack.append(flow.none)
        elif kind in ("RETURN_VALUE", "RETURN_CONST"):
            result = take(1)[0] if kind == "RETURN_VALUE" else flow.constant(value)
            self.ends.append((local.get(".yields", result), path))
            return None, False
        elif kind in ("RAISE_VARARGS", "RERAISE"):
            return None, False
        elif kind == "END_FOR":
            take(2 if _VERSION == (3, 12) else 1)
        elif kind == "FOR_ITER":
            return self._loop(self.indices[value], frame), True
        elif kind.startswith("JUMP_") and "IF" not in kind:
            back = self.indices[value] <= index
            if back:
                visits[index] = visits.get(index, 0) + 1
            return (
                None if visits.get(index, 0) > 3 else _Frame(self.indices[value], stack, local, path, (), visits)
            ), True
        elif "JUMP" in kind and "IF" in kind:
            return self._branch(kind, self.indices[value], take, frame), True
        else:
            raise Unclear
        pending = names if kind in _NOTHING else ()  # between KW_NAMES and CALL
        return _Frame(after, stack, local, path, pending, visits), after in self.targets

    # -- names

    def _variable(self, name: str, local: dict[str, Value], path: Path) -> Value:
        if ("cell", name) in path.memory and name in self.inner.code.co_cellvars:
            return path.memory["cell", name]
        if name in local:
            return local[name]
        if name not in self.inner.cells:
            return self.flow.null
        cell = self.inner.cells[name]
        key = ("cell", id(cell) if isinstance(cell, types.CellType) else name)
        if key in path.memory:
            return path.memory[key]
        if not isinstance(cell, types.CellType):
            return self.flow.object(cell)
        try:
            return self.flow.kept_now() if key in self.flow.written else self.flow.object(cell.cell_contents)
        except ValueError:  # not filled yet
            return self.flow.kept_now()

    def _store(self, name: str, value: Value, local: dict[str, Value], path: Path) -> None:
        cell = self.inner.cells.get(name)
        if isinstance(cell, types.CellType):
            self.flow.written.add(("cell", id(cell)))
            path.memory["cell", id(cell)] = value
        else:
            local[name] = path.memory["cell", name] = value

    def _global(self, name: str, path: Path) -> Value:
        key, scope = (id(self.inner.scope), name), self.inner.scope
        if key in path.memory:
            return path.memory[key]
        if key in self.flow.written or not (name in scope or hasattr(builtins, name)):
            return self.flow.kept_now()
        return self.flow.object(scope[name] if name in scope else getattr(builtins, name))

    # -- calls and branches

    def _call(self, kind: str, count: int, names: tuple[str, ...], take: Any, frame: _Frame) -> tuple[Any, bool]:
        flow, stack = self.flow, frame.stack
        star: list[Value] = []
        named: list[Value] = []
        if kind == "CALL_FUNCTION_EX":
            named = take(1) if count & 1 else []
            star, args = take(1), []
        else:
            if kind in ("CALL_KW", "CALL_FUNCTION_KW"):
                names = take(1)[0].concrete
            args = take(count)
        kwargs = dict(zip(names, args[len(args) - len(names) :])) if names else {}
        args = args[: len(args) - len(names)]
        callees = take(1 if _OLD and kind != "CALL_METHOD" else 2)
        callees = [each for each in callees if each is not flow.null]
        if not callees:
            raise Unclear
        if callees[0].concrete is super and not args:
            first = self.inner.code.co_varnames[0]
            args = [self._variable(name, frame.local, frame.path) for name in ("__class__", first)]
        ends = flow.call(callees[0], [*callees[1:], *args], kwargs, star, named, frame.path, self.depth)
        for result, path in ends[1:]:
            self._later(frame, frame.position + 1, [*stack, result], path)
        if not ends:
            return None, False
        stack.append(ends[0][0])
        return _Frame(frame.position + 1, stack, frame.local, ends[0][1], (), frame.visits), len(ends) > 1

    def _make(self, flags: int, take: Any, frame: _Frame) -> None:
        code = take(2)[0].concrete if _OLD else take(1)[0].concrete
        closure = take(flags.bit_count() if _VERSION < (3, 13) else 0)
        variables = {name: self._variable(name, frame.local, frame.path) for name in code.co_freevars}
        variables = {name: v if v is not self.flow.null else self.flow.kept_now() for name, v in variables.items()}
        defaults = closure[0] if flags & 1 and _VERSION < (3, 13) else None
        frame.stack.append(self.flow.function(Code(code, self.inner.scope, variables), defaults))

    def _loop(self, target: int, frame: _Frame) -> Any:
        flow, (index, stack, local, path, _, visits) = self.flow, frame
        done = visits.get(index, 0)
        iterator = stack[-1]
        if iterator.concrete is not flow.missing and hasattr(iterator.concrete, "__next__"):
            flow.change(path, iterator)
            iterator = flow.kept_now()
        more = flow.made("more", iterator, flow.constant(done))
        left = [*stack[:-1]] if _VERSION < (3, 12) else [*stack, flow.none]
        self._later(frame, target, left, path.fork(more, False))
        if done >= 2:
            return None
        item = flow.made("each", iterator, flow.constant(done))
        return _Frame(index + 1, [*stack, item], local, path.fork(more, True), (), {**visits, index: done + 1})

    def _branch(self, kind: str, target: int, take: Any, frame: _Frame) -> Any:
        flow, path = self.flow, frame.path
        tested = flow.made("match", *take(2)) if kind == "JUMP_IF_NOT_EXC_MATCH" else take(1)[0]
        stack, jumps = frame.stack, "FALSE" not in kind and "NOT_EXC" not in kind
        if "NONE" in kind:
            jumps = "NOT_NONE" not in kind
            outcome = None
            if tested.op == "constant" or (tested.op == "object" and not tested.kept):
                outcome = tested.concrete is None
            tested = tested if tested.kept else flow.made("is none", tested)
        else:
            outcome = bool(tested.concrete) if tested.op == "constant" else None
        keeps = [tested] if kind.endswith("OR_POP") else []
        if outcome is not None:
            index = target if outcome == jumps else frame.position + 1
            return _Frame(index, [*stack, *(keeps if outcome == jumps else [])], frame.local, path, (), frame.visits)
        self._later(frame, target, [*stack, *keeps], path.fork(tested, jumps))
        return _Frame(frame.position + 1, stack, frame.local, path.fork(tested, not jumps), (), frame.visits)


def _key(frame: _Frame) -> Any:
    memory = frozenset((key, id(value)) for key, value in frame.path.memory.items())
    local = frozenset((name, id(value)) for name, value in frame.local.items())
    visits = frozenset((index, count) for index, count in frame.visits.items() if index >= 0)
    return frame.position, tuple(map(id, frame.stack)), local, memory, frame.path.trace, visits
