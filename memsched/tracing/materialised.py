"""Which values of a jaxpr XLA:CPU writes to memory, how large they are there, and until when."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.extend.core as jex

from memsched.tracing.graph import CONSTANT, Graph, Operation, aval, words

COSTLY = words(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma div erf erf_inv erfc exp exp2 "
    "expm1 lgamma log log1p logistic pow rem rsqrt sin sinh sqrt tan tanh"
)
CHEAP = words(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp "
    "convert_element_type copy copy_p dynamic_slice eq floor gather ge gt imag integer_pow iota "
    "is_finite le lt max min mul ne neg nextafter not or pad population_count real "
    "reduce_precision rev round select_n shift_left shift_right_arithmetic shift_right_logical "
    "sign slice split square sub transpose xor"
)
FUSED = COSTLY | CHEAP
REDUCTIONS = words(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
)
# Their first operand becomes their result.
WRITES_INTO = words(
    "dynamic_update_slice scatter scatter-add scatter_add scatter_max scatter_min scatter_mul "
    "scatter_sub"
)
MOVES = words("pad rev transpose")
HIDING_ROWS = 129  # of an operand: 128 are not made inside a product, 512 are
WIDE_BYTES = 4  # of a value of 16 bits that XLA:CPU holds as float32


@dataclasses.dataclass(frozen=True, slots=True)
class Materialised:
    """Of every value that an operation makes in memory its bytes; `last` is its last reader.

    `hidden` are the operands that products compute inside themselves.
    """

    written: dict[int, int]
    last: dict[int, int]
    hidden: dict[int, int]

    def hidden_bytes(self, *, wide: bool) -> int:
        """Bytes of the largest hidden operand; in float32 if `wide`.

        In a loop, the values before they are rounded were seen to stay too.
        """
        largest = 0
        for value, size in self.hidden.items():
            largest = max(largest, WIDE_BYTES * size if wide else self.written[value])
        return largest


def materialised(graph: Graph) -> Materialised:
    """Follows the values from the end of the graph to its start."""
    walk = _Walk(graph, _readers(graph))
    for position in reversed(range(len(graph.operations))):
        operation = graph.operations[position]
        for value in operation.results:
            walk.add(value, position)
            if operation.name not in FUSED or walk.must_write(value, operation):
                walk.written[value] = walk.nbytes(value, operation)
    for value in range(graph.inputs):
        walk.add(value, -1)
    return Materialised(walk.written, walk.last, _hidden(graph, walk.written))


def narrow(dtype: Any) -> bool:
    """Is this a float of 16 bits?"""
    return str(dtype) in ("bfloat16", "float16")


def rows(equation: jex.JaxprEqn, side: int) -> int:
    """Rows of a product's left (0) or right (1) operand, for each batch."""
    contracted, batch = equation.params["dimension_numbers"]
    shape = aval(equation.invars[side]).shape
    fixed = {*contracted[side], *batch[side]}
    return math.prod(size for axis, size in enumerate(shape) if axis not in fixed)


@dataclasses.dataclass(frozen=True, slots=True)
class _Walk:
    """`roots` are the operations in memory that a value flows into, through fused ones."""

    graph: Graph
    readers: dict[int, list[int]]
    written: dict[int, int] = dataclasses.field(default_factory=dict)
    last: dict[int, int] = dataclasses.field(default_factory=dict)
    roots: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)

    def add(self, value: int, position: int) -> None:
        """Notes who reads a value, once all that is known of its readers."""
        roots: set[int] = set()
        last = position
        for reader in self.readers.get(value, ()):
            operation = self.graph.operations[reader]
            inside = [result for result in operation.results if result not in self.written]
            if operation.name in FUSED and inside:
                for result in inside:
                    roots |= self.roots[result]
                    last = max(last, self.last[result])
            if operation.name not in FUSED or len(inside) < len(operation.results):
                roots.add(reader)
                last = max(last, reader)
        self.roots[value], self.last[value] = frozenset(roots), last

    def must_write(self, value: int, operation: Operation) -> bool:
        """Must the result of a fused operation be in memory?"""
        readers = self.readers.get(value, ())
        if self.is_folded(operation, readers):
            return False
        if value in self.graph.outputs or any(self.in_memory(value, reader) for reader in readers):
            return True
        roots = self.roots[value]
        if len(roots) < 2 or self.expands(operation):
            return False
        reductions = any(self.graph.operations[root].name in REDUCTIONS for root in roots)
        return reductions or operation.name in COSTLY

    def in_memory(self, value: int, reader: int) -> bool:
        """Does this reader want the value in memory?"""
        operation = self.graph.operations[reader]
        if operation.name in WRITES_INTO:
            return operation.operands[0] == value
        if operation.name in REDUCTIONS:
            return False
        if operation.name not in FUSED:
            return True
        (result, *_) = operation.results
        return self.is_folded(operation, self.readers.get(result, ()))

    def is_folded(self, operation: Operation, readers: Sequence[int]) -> bool:
        """Is this a transposed matrix that products read as it lies?"""
        names = {self.graph.operations[reader].name for reader in readers}
        matrix = len(aval(operation.equation.outvars[0]).shape) == 2
        return operation.name == "transpose" and matrix and names == {"dot_general"}

    def expands(self, operation: Operation) -> bool:
        """Is the result made of much smaller values, so that it is cheaper to make it again?"""
        sizes = [aval(var).size for var in operation.equation.invars]
        return bool(2 * max(sizes, default=0) <= aval(operation.equation.outvars[0]).size)

    def nbytes(self, value: int, operation: Operation) -> int:
        """Bytes of a value in memory. Some of 16 bits are kept as float32."""
        found = self.graph.avals[value]
        wide = narrow(found.dtype) and any(
            self.is_widened(value, operation, reader) for reader in self.readers.get(value, ())
        )
        return int(found.size * (WIDE_BYTES if wide else found.dtype.itemsize))

    def is_widened(self, value: int, operation: Operation, reader: int) -> bool:
        """Is it float32 for this reader: a product with one row, or a loop over moved values?"""
        by = self.graph.operations[reader]
        if by.name == "dot_general" and operation.name in FUSED:
            return rows(by.equation, by.operands.index(value) ^ 1) == 1
        return by.name == "scan" and operation.name in MOVES


def _readers(graph: Graph) -> dict[int, list[int]]:
    readers: dict[int, list[int]] = {}
    for position, operation in enumerate(graph.operations):
        for value in {*operation.operands} - {CONSTANT}:
            readers.setdefault(value, []).append(position)
    return readers


def _hidden(graph: Graph, written: Mapping[int, int]) -> dict[int, int]:
    """Operands of products that are made of the results of reductions, and their sizes.

    XLA:CPU fuses a softmax or a norm into a product of many rows, which then has its own memory.
    """
    normalised: set[int] = set()
    found: dict[int, int] = {}
    for operation in graph.operations:
        if operation.name == "dot_general":
            for side, value in enumerate(operation.operands):
                many = rows(operation.equation, side) >= HIDING_ROWS
                if many and value in normalised and value in written:
                    found[value] = int(graph.avals[value].size)
        elif operation.name in REDUCTIONS or (
            operation.name in FUSED and normalised.intersection(operation.operands)
        ):
            normalised.update(operation.results)
    return found
