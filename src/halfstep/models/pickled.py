"""The pickle of a PyTorch file, checked before torch reads it: it is described, and not run.

A pickle is a program that names and calls functions. `check_pickle` follows it with descriptions of
the objects that it would make. No name in it is imported, and nothing is called. What passes makes
tensors, plain values, and objects of a few libraries that torch then replaces by `Inert`.
"""

from __future__ import annotations

import math
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_OPERATIONS = 1_000_000  # of one pickle; a tokenizer in it may have hundreds of thousands
MAX_CALLS = 100_000  # a tensor needs two
MAX_NAMES = 100  # torch looks at each of them in each call
MAX_COPIED = 2**24  # characters and entries that calls may copy
ITEM_BYTES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
VALUES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.int64")
# What checkpoints hold beside tensors: configurations, tokenizers, paths and their types.
LIBRARIES = "omegaconf transformers tokenizers lightning pytorch_lightning numpy pathlib typing"
TYPES = "dict list tuple int float str bool object"
LONGEST_KEY = 8  # parts of a tuple that is the key of an entry


class RefusedError(ValueError):
    """What a file of weights holds that is not read, as the middle of a sentence."""


class Named(str):
    """A function, type or value that a pickle names."""

    __slots__ = ()


class Mark:
    """The place on the stack from which a later operation takes its items."""


@dataclass(eq=False)
class Described:
    """An object that a pickle would make: who makes it, and how many entries it has.

    `is_flat`: no entry is a tuple.
    """

    maker: str
    entries: int = 0
    is_flat: bool = True


@dataclass(frozen=True)
class Storage:
    """The numbers of a tensor, as they lie in the file."""

    elements: int


class Inert(dict[Any, Any]):
    """Stand-in for an object of another library. It accepts any arguments and does nothing."""

    def __init__(self, *args: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def plain_dict(*args: Any) -> dict[Any, Any]:
    """Stand-in for collections.defaultdict: it forgets how missing entries are made."""
    return {}


def stand_in(name: str) -> Callable[..., Any] | None:
    """What torch makes in place of the object `name` of another library, None if nothing."""
    if name == "collections.defaultdict":
        return plain_dict
    module, _, rest = name.partition(".")
    if module in LIBRARIES.split() or (module == "builtins" and rest in TYPES.split()):
        return Inert
    return None


def check_pickle(data: bytes, records: Mapping[str, int]) -> set[str]:
    """The names in a pickle that need a stand-in.

    `records` maps the names of the file's storages to their bytes. RefusedError if the pickle names
    or calls anything else than tensors need, reaches beyond a storage, or is damaged or too long.
    """
    machine = _Machine(records)
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if count > MAX_OPERATIONS:
            raise RefusedError(f"has a pickle of more than {MAX_OPERATIONS:,} operations")
        machine.step(operation.name, argument)
    return {name for name in machine.names if stand_in(name)}


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _no_arguments(arguments: tuple[Any, ...]) -> bool:
    return arguments == ()


def _is_tensor(arguments: tuple[Any, ...]) -> bool:
    """Does the tensor (storage, offset, size, stride, requires_grad, hooks) lie in its storage?

    It may not have more elements than the storage: nothing is repeated.
    """
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        return False
    storage, offset, size, stride, *_ = arguments
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        return False
    if len(size) > 8 or not all(map(_is_index, (offset, *size, *stride))):
        return False
    elements = math.prod(size)
    if elements == 0:
        return offset <= storage.elements
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return elements <= storage.elements and last < storage.elements


def _is_parameter(arguments: tuple[Any, ...]) -> bool:
    makers = [value.maker for value in arguments if isinstance(value, Described)]
    return len(arguments) == 3 and makers[:1] == ["torch._utils._rebuild_tensor_v2"]


def _is_latin1(arguments: tuple[Any, ...]) -> bool:
    """The one use of codecs.encode in a checkpoint: pickles of protocol 2 hold bytes as text."""
    return len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1"


def _is_device(arguments: tuple[Any, ...]) -> bool:
    return arguments in [("cpu",), ("cuda",)] or (
        len(arguments) == 2 and arguments[0] == "cuda" and _is_index(arguments[1])
    )


def _is_size(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) == 1 and type(arguments[0]) is tuple and all(map(_is_index, arguments[0]))


def _is_flat_list(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) == 1 and _maker(arguments[0]) == "list" and arguments[0].is_flat


def _is_key(value: object) -> bool:
    """Is it quickly hashed? The hash of nested tuples goes down to the last, and may not return."""
    if not isinstance(value, tuple):
        return True
    return len(value) <= LONGEST_KEY and not any(isinstance(part, tuple) for part in value)


CALLS: dict[str, Callable[[tuple[Any, ...]], bool]] = {  # function: are its arguments allowed?
    "torch._utils._rebuild_tensor_v2": _is_tensor,
    "torch._utils._rebuild_parameter": _is_parameter,
    "torch.Size": _is_size,
    "torch.device": _is_device,
    "collections.OrderedDict": _no_arguments,
    "builtins.set": _is_flat_list,
    "_codecs.encode": _is_latin1,
}
MAPPINGS = ("dict", "collections.OrderedDict", "collections.defaultdict")


def _maker(value: object) -> str:
    return value.maker if isinstance(value, Described) else type(value).__name__


class _Machine:
    """The stack and the memory of the pickle machine, with descriptions in place of objects."""

    def __init__(self, records: Mapping[str, int]):
        self.records = records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.calls = 0
        self.copied = 0

    def step(self, operation: str, argument: Any) -> None:
        """Follow one operation. RefusedError if torch.save does not write it."""
        if operation in CONSTANTS:
            self.stack.append(CONSTANTS[operation])
        elif operation in LITERALS:
            self.stack.append(argument)
        elif operation in EMPTY:
            self.stack.append(Described(EMPTY[operation]))
        elif operation in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top()
        elif operation in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise RefusedError("has a damaged pickle")
            self.stack.append(self.memo[argument])
        elif operation in ACTIONS:
            ACTIONS[operation](self, argument)
        elif operation not in ("PROTO", "STOP") or argument not in (2, None):
            raise RefusedError(f"has the operation {operation} in its pickle, or another protocol")

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is Mark:
            raise RefusedError("has a damaged pickle")
        return self.stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self.stack.pop()
        return value

    def _pop_mark(self) -> tuple[Any, ...]:
        """The items above the last mark."""
        items: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is Mark:
                return tuple(reversed(items))
            items.append(value)
        raise RefusedError("has a damaged pickle")

    def mark(self, _: Any) -> None:
        self.stack.append(Mark)

    def tuple_of_items(self, _: Any) -> None:
        self.stack.append(self._pop_mark())

    def tuple_of_top(self, count: int) -> None:
        items = tuple(self._pop() for _ in range(count))
        self.stack.append(items[::-1])

    def add_item(self, count: int) -> None:
        """One item of a list (count 1), or one entry of a mapping (count 2)."""
        items = tuple(self._pop() for _ in range(count))
        self._extend(items[::-1], count)

    def add_items(self, count: int) -> None:
        self._extend(self._pop_mark(), count)

    def _extend(self, items: tuple[Any, ...], count: int) -> None:
        target = self._top()
        allowed = ("list",) if count == 1 else MAPPINGS
        if _maker(target) not in allowed or len(items) % count:
            raise RefusedError(f"adds entries to {_maker(target)}")
        if count == 2 and not all(map(_is_key, items[::2])):
            raise RefusedError("has nested tuples as the key of an entry")
        if any(isinstance(item, tuple) for item in items):
            target.is_flat = False
        target.entries += len(items) // count

    def name(self, argument: str) -> None:
        module, _, rest = argument.partition(" ")
        if (module, rest) in NAME_MAPPING:  # protocol 2 has the names of Python 2
            module, rest = NAME_MAPPING[module, rest]
        name = f"{IMPORT_MAPPING.get(module, module)}.{rest}"
        if not (name in CALLS or name in VALUES or name in ITEM_BYTES or stand_in(name)):
            raise RefusedError(f"names {name[:80]!r}, which is not among what weights need")
        self.names.add(name)
        if len(self.names) > MAX_NAMES:
            raise RefusedError(f"names more than {MAX_NAMES} functions and types")
        self.stack.append(Named(name))

    def storage(self, _: Any) -> None:
        """('storage', type, key, location, number of elements), as long as its record says."""
        match self._pop():
            case ("storage", Named() as kind, str() as key, str(), int() as elements):
                found = self.records.get(key)
                if kind in ITEM_BYTES and found == elements * ITEM_BYTES[kind]:
                    self.stack.append(Storage(elements))
                    return
        raise RefusedError("has a tensor whose storage is not in the file, or of another length")

    def call(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Named or type(arguments) is not tuple:
            raise RefusedError(f"calls {_maker(function)}")
        self._count((arguments, *arguments))
        is_allowed = CALLS.get(function)
        if is_allowed and not is_allowed(arguments):
            raise RefusedError(f"calls {function} with arguments that torch.save does not write")
        if not is_allowed and not stand_in(function):
            raise RefusedError(f"calls {function}")
        self.stack.append(Described(str(function)))

    def build(self, _: Any) -> None:
        """Give an object its state."""
        state, target = self._pop(), self._top()
        maker = _maker(target)
        if maker != "collections.OrderedDict" and stand_in(maker) is not Inert:
            raise RefusedError(f"sets the state of {maker}")
        self._count((state,))

    def _count(self, values: tuple[Any, ...]) -> None:
        """Bound the calls, and what they copy: a value that is kept once can be copied often."""
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise RefusedError(f"has a pickle of more than {MAX_CALLS:,} calls")
        for value in values:
            if isinstance(value, Described):
                self.copied += value.entries
            elif isinstance(value, tuple | str | bytes):
                self.copied += len(value)
        if self.copied > MAX_COPIED:
            raise RefusedError("has a pickle that copies its values too often")


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE")
EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict"}
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_of_items,
    "TUPLE1": lambda machine, _: machine.tuple_of_top(1),
    "TUPLE2": lambda machine, _: machine.tuple_of_top(2),
    "TUPLE3": lambda machine, _: machine.tuple_of_top(3),
    "APPEND": lambda machine, _: machine.add_item(1),
    "APPENDS": lambda machine, _: machine.add_items(1),
    "SETITEM": lambda machine, _: machine.add_item(2),
    "SETITEMS": lambda machine, _: machine.add_items(2),
    "GLOBAL": _Machine.name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
}
