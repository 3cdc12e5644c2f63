"""What a compiled program does in one run on one device, read from XLA's optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once and takes what stays in a TPU's on-chip memory for traffic
with the main memory; this is read from the text instead, loops as often as they run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# They move nothing themselves: names for what is there, calls whose insides are counted, ends of what began before.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip

_HEADER = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?)\s([a-z][\w-]*)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(calls|body|to_apply|branch_computations|true_computation|false_computation)=\{?((?:%[^\s,}]+(?:, )?)+)"
)


@dataclass(frozen=True)
class Array:
    """One array of a type such as `bf16[3,3,16,32]{3,2,1,0:T(8,128)(2,1)S(1)}`."""

    kind: str  # such as "bf16"
    shape: tuple[int, ...]
    bytes: float
    main: bool  # in main memory: no S(n) names another one


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # of its result
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes
    arguments: str  # as written: the number of a constant stands there


@dataclass
class Traffic:
    """Collectives of one kind."""

    count: int = 0
    kinds: dict[str, float] = field(default_factory=dict)  # bytes by kind of number, such as "bf16"

    @property
    def bytes(self) -> float:
        """Returns all bytes."""
        return sum(self.kinds.values())


@dataclass
class Costs:
    """What one run of the program does on one device."""

    operations: float = 0  # two for each multiplication of its convolutions and matrix products
    memory: float = 0  # bytes read from and written to main memory
    collectives: dict[str, Traffic] = field(default_factory=dict)  # by one of KINDS


def costs(text: str) -> Costs:
    """Returns what the program of an optimised HLO module (`Compiled.as_text()`) does on one device."""
    program, total = Program(text), Costs()
    seen: set[tuple[str, str]] = set()
    for computation, times, fused in program.runs():
        for instruction in program.computations[computation].values():
            if instruction.op in ("convolution", "dot"):
                total.operations += times * program.operations(computation, instruction)
            if not fused:
                total.memory += times * program.memory(computation, instruction)
            kind = instruction.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            # One collective may be cut into pieces inside several fusions, which then share its channel.
            channel = re.search(r"channel_id=\d+", instruction.rest)
            if channel and fused and (kind, channel[0]) in seen:
                continue
            if channel:
                seen.add((kind, channel[0]))
            traffic = total.collectives.setdefault(kind, Traffic())
            traffic.count += times
            for array in program.moved(computation, instruction):
                traffic.kinds[array.kind] = traffic.kinds.get(array.kind, 0) + times * array.bytes
    return total


class Program:
    """A module's computations, and how often each runs."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, inside = "", ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                inside = header[2]
                self.entry = inside if header[1] else self.entry
                self.computations[inside] = {}
            elif inside and (found := _LINE.match(line)):
                name, kind, op, arguments, rest = found.groups()
                operands = tuple(_NAME.findall(arguments))
                self.computations[inside][name] = Instruction(name, _arrays(kind), op, operands, rest, arguments)

    def runs(self) -> Iterator[tuple[str, int, bool]]:
        """Yields (computation, how often it runs, whether inside a fusion) for every place it is called from."""
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            yield name, times, fused
            for instruction in self.computations[name].values():
                trips = self._trips(instruction) if instruction.op == "while" else 1
                for how, called in _CALLED.findall(instruction.rest):
                    if how == "to_apply" and instruction.op != "call":
                        continue  # the sum of a reduction
                    inner = fused or how == "calls"
                    waiting += [
                        (one, times * trips, inner) for one in _NAME.findall(called) if one in self.computations
                    ]

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: what its backend says, or the bound its counter is compared with."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%([\w.-]+)", loop.rest)
        lines = self.computations.get(condition[1], {}) if condition else {}
        for line in lines.values():
            if line.op == "compare" and "direction=LT" in line.rest:
                bounds = [lines[name] for name in line.operands if name in lines and lines[name].op == "constant"]
                if bounds and bounds[0].arguments.isdecimal():
                    return int(bounds[0].arguments)
        return 1

    def _operands(self, computation: str, instruction: Instruction) -> list[tuple[Array, ...]]:
        known = self.computations[computation]
        return [known[name].arrays if name in known else () for name in instruction.operands]

    def memory(self, computation: str, instruction: Instruction) -> float:
        """Returns the bytes that an instruction reads from and writes to main memory."""
        if instruction.op in FREE or instruction.op.endswith("-done"):
            return 0
        if instruction.op.endswith("-start"):
            # Of source and target, in either order, and flags: the smaller is moved, where it is a slice.
            arrays = sorted((a for a in instruction.arrays if a.shape), key=lambda a: a.bytes)[-2:]
            return min((a.bytes for a in arrays), default=0) * sum(a.main for a in arrays)
        groups = [instruction.arrays, *self._operands(computation, instruction)]
        return sum(array.bytes for arrays in groups for array in arrays if array.main)

    def moved(self, computation: str, instruction: Instruction) -> list[Array]:
        """Returns the arrays of a collective: the whole that is gathered, else what this device puts in."""
        given = [array for arrays in self._operands(computation, instruction) for array in arrays]
        if not instruction.op.startswith("all-gather"):
            return given
        # One that is started names what it is given, then what it makes.
        return list(instruction.arrays[len(given) * instruction.op.endswith("-start") :])

    def operations(self, computation: str, instruction: Instruction) -> float:
        """Returns the operations of a convolution or matrix product, without those on padding and dilation."""
        (left, *_), (right, *_) = self._operands(computation, instruction)[:2]
        (result, *_) = instruction.arrays
        if instruction.op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            axes = [int(axis) for axis in contracted[1].split(",")] if contracted and contracted[1] else []
            return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in axes)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
        assert labels, f"{instruction.name}: a convolution without dim_labels"
        of_left, of_right, of_result = labels.groups()
        window = re.search(r"window=\{([^}]*)\}", instruction.rest)
        settings = dict(part.split("=") for part in window[1].split()) if window else {}
        pairs = 1
        for place, axis in enumerate(sorted(label for label in of_left if label.isdigit())):

            def setting(name: str, default: str, place: int = place) -> str:
                return settings[name].split("x")[place] if name in settings else default

            pairs *= _pairs(
                side=left.shape[of_left.index(axis)],
                results=result.shape[of_result.index(axis)],
                taps=right.shape[of_right.index(axis)],
                stride=int(setting("stride", "1")),
                low=int(setting("pad", "0_0").split("_")[0]),
                apart=int(setting("lhs_dilate", "1")),
                step=int(setting("rhs_dilate", "1")),
            )
        depth = right.shape[of_right.index("i")]
        return 2.0 * pairs * depth * result.shape[of_result.index("b")] * result.shape[of_result.index("f")]


def _pairs(side: int, results: int, taps: int, stride: int, low: int, apart: int, step: int) -> int:
    """Returns how many (result, tap) along an axis meet a number of the input, and not padding or a dilation's zero."""
    count = 0
    for tap in range(taps):
        start = tap * step - low
        places = range(start, start + results * stride, stride)
        inside = (place for place in places if 0 <= place <= (side - 1) * apart)
        count += sum(1 for place in inside if place % apart == 0)
    return count


def _arrays(kind: str) -> tuple[Array, ...]:
    found = []
    for name, sides, layout in _ARRAY.findall(kind):
        shape = tuple(int(side) for side in sides.split(",") if side)
        bits = 8 if name == "pred" else int(re.sub(r"\D", "", name) or 0)
        found.append(Array(name, shape, bits / 8 * math.prod(shape), "S(" not in layout))
    return tuple(found)
