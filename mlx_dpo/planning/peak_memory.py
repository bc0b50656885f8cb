"""How much memory a graph takes while MLX evaluates it.

MLX's evaluation is a plain thing to imitate: it puts the operations of a graph in an order that depends on the graph
alone, allocates the output of each when it dispatches it, lets an operation write over an input that nobody else will
read, and frees an input when the last operation that reads it has run. Some operations are always under way; what is
allocated for them, and not yet freed behind them, is a good part of the peak. (MLX 0.32: transforms.cpp,
backend/cpu/encoder.h, backend/metal/device.cpp.)

Where there is memory below its limit (`mx.set_memory_limit`) MLX dispatches further ahead and takes more. What is told
here is what it takes when it waits: less cannot do.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from typing import NamedTuple

from mlx_dpo.planning.graph import Graph, Op

WIDTH = int(os.environ.get("MLX_BFS_MAX_WIDTH", 20))
"""Operations side by side that MLX orders breadth first before it goes down a level."""


class InFlight(NamedTuple):
    """How many dispatches MLX has under way when it waits: up to `most`.

    An operation that only looks at its input in another way counts as `view`, any other one as `work`.
    """

    most: int
    view: int
    work: int


IN_FLIGHT = {"cpu": InFlight(10, 1, 2), "gpu": InFlight(40, 0, 1)}
"""By kind of device: one of its tasks. On a GPU that is a command buffer; how many operations go into one depends on
the chip (20 to 50) and on their size."""

_VIEWS = """AsStrided Broadcast BroadcastAxes Contiguous Copy Depends ExpandDims Slice Split Squeeze StopGradient
Transpose View"""

_OVERWRITE = """Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseBinary Ceil Cos Cosh Divide
Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual LayerNorm Less LessEqual Log Log1p LogAddExp LogicalAnd LogicalNot
LogicalOr Maximum Minimum Multiply Negative NotEqual Power RMSNorm Remainder RoPE Round Rsqrt Scan Scatter ScatterAxis
Select Sigmoid Sign Sin Sinh SliceUpdate Softmax Sqrt Square Subtract Tan Tanh"""

VIEWS = frozenset(_VIEWS.split())
"""Operations whose outputs lie in the memory of their inputs."""

RESHAPES = frozenset({"Reshape", "Flatten", "Unflatten"})
"""The same, where the input lies in one piece."""

OVERWRITE = frozenset(_OVERWRITE.split())
"""Operations that write over an input of the same size that nobody else will read."""


def evaluation_order(graph: Graph) -> list[int]:
    """The places in `graph.ops` of the operations that its results need, in the order in which MLX evaluates them.

    Breadth first from the results to the inputs, an operation only after all that read it, at most `WIDTH` at a time;
    then the other way round.
    """
    maker = {array: i for i, op in enumerate(graph.ops) for array in op.outputs}
    needs = [[maker[array] for array in op.inputs if array in maker] for op in graph.ops]
    needs.append([maker[array] for array in graph.results if array in maker])
    readers = [0] * len(needs)
    stack, seen = [len(needs) - 1], {len(needs) - 1}
    while stack:
        for i in needs[stack.pop()]:
            readers[i] += 1
            if i not in seen:
                seen.add(i)
                stack.append(i)
    tape, waiting, at = [len(needs) - 1], list[tuple[int, int]](), 0
    while at < len(tape) or waiting:
        if at < len(tape):
            op, first = tape[at], 0
            at += 1
        else:
            op, first = waiting.pop()
        for place in range(first, len(needs[op])):
            if len(tape) - at >= WIDTH:
                waiting.append((op, place))
                break
            i = needs[op][place]
            readers[i] -= 1
            if readers[i] == 0:
                tape.append(i)
    return tape[:0:-1]


def peak_memory(graph: Graph, in_flight: InFlight) -> int:
    """The most bytes allocated at once, beside the inputs, while MLX evaluates `graph` and waits where it can.

    The caller keeps the inputs, so they are neither freed nor written over.
    """
    memory = _Memory(graph, order := evaluation_order(graph))
    under_way: deque[tuple[int, set[int]]] = deque()  # dispatches of an operation, and the buffers that it reads
    dispatched = 0
    for op in (graph.ops[place] for place in order):
        read = memory.dispatch(op)
        looks = op.name in VIEWS or op.name in RESHAPES
        under_way.append((in_flight.view if looks else in_flight.work, read))
        dispatched += under_way[-1][0]
        while dispatched >= in_flight.most:
            count, done = under_way.popleft()
            dispatched -= count
            memory.finish(done)
    return memory.peak


class _Memory:
    """The buffers of an evaluation: which array lies in which, who will still read it, what is allocated."""

    def __init__(self, graph: Graph, order: list[int]) -> None:
        self._arrays = graph.arrays
        self._readers = Counter(graph.results)
        for place in order:
            self._readers.update(graph.ops[place].inputs)
        self._buffer: dict[int, int] = {}  # array: buffer; arrays of the caller's have none
        self._in_pieces: set[int] = set()  # arrays that do not lie in one piece
        self._arrays_in: list[int] = []  # by buffer: arrays in it that somebody will read
        self._reading: list[int] = []  # by buffer: operations under way that read it
        self._size: list[int] = []
        self.allocated = self.peak = 0

    def dispatch(self, op: Op) -> set[int]:
        """Gives the outputs their memory; the buffers that are in use until the operation has run."""
        if op.name in VIEWS or (op.name in RESHAPES and op.inputs[0] not in self._in_pieces):
            sources = op.inputs if op.name == "Depends" else op.inputs[:1] * len(op.outputs)
            for output, source in zip(op.outputs, sources, strict=False):
                self._look(op, source, output)
        elif (buffer := self._overwritable(op)) is not None:
            self._put(op.outputs[0], buffer)
        else:
            for output in op.outputs:
                self._allocate(output)
        written = {self._buffer[array] for array in op.outputs if array in self._buffer}
        read = {self._buffer[array] for array in op.inputs if array in self._buffer} - written
        for array in op.inputs:
            self._readers[array] -= 1
            if self._readers[array] == 0:
                self._release(array)
        for array in op.outputs:
            if not self._readers[array]:
                read |= {self._buffer[array]} if array in self._buffer else set()
                self._release(array)
        for buffer in read:
            self._reading[buffer] += 1
        return read

    def finish(self, read: set[int]) -> None:
        """An operation has run: what it was the last to read is freed."""
        for buffer in read:
            self._reading[buffer] -= 1
            if not self._reading[buffer] and not self._arrays_in[buffer]:
                self.allocated -= self._size[buffer]

    def _allocate(self, array: int) -> None:
        self._arrays_in.append(0)
        self._reading.append(0)
        self._size.append(self._arrays[array].nbytes)
        self._put(array, len(self._size) - 1)
        self.allocated += self._size[-1]
        self.peak = max(self.peak, self.allocated)

    def _put(self, array: int, buffer: int) -> None:
        self._buffer[array] = buffer
        self._arrays_in[buffer] += 1

    def _release(self, array: int) -> None:
        if (buffer := self._buffer.pop(array, None)) is not None:
            self._arrays_in[buffer] -= 1

    def _overwritable(self, op: Op) -> int | None:
        """The buffer of an input that the operation may write over: its last reader, and the size fits."""
        if op.name not in OVERWRITE:
            return None
        for array in op.inputs:
            buffer = self._buffer.get(array)
            if (
                buffer is not None
                and self._readers[array] == 1
                and self._arrays_in[buffer] == 1
                and not self._reading[buffer]
                and array not in self._in_pieces
                and self._size[buffer] == self._arrays[op.outputs[0]].nbytes
            ):
                return buffer
        return None

    def _look(self, op: Op, source: int, output: int) -> None:
        if source in self._buffer:
            self._put(output, self._buffer[source])
        before, after = self._arrays[source], self._arrays[output]
        if source in self._in_pieces or not _in_one_piece(op, before.shape, after.shape):
            self._in_pieces.add(output)


def _in_one_piece(op: Op, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a view of an array that lies in one piece still does."""
    if op.name == "Transpose":
        moved = [axis for axis in op.arguments[0] if before[axis] != 1]
        return moved == sorted(moved)
    if op.name in ("Slice", "Split"):
        first = next((i for i, size in enumerate(before) if size != 1), 0)
        return before[first + 1 :] == after[first + 1 :]
    if op.name in ("Broadcast", "BroadcastAxes", "AsStrided"):
        return before == after
    return True
