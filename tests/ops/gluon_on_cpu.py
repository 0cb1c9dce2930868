"""Runs Gluon kernels for Hopper as Python on the CPU, so that their logic is tested where there is no GPU.

Triton's interpreter does not know Gluon. Here every warp partition is a thread; barriers block and count; a
bulk copy lands at once or later, and an asynchronous product reads its operands when it is issued or only
when it is waited for, at random. So a barrier that is missing shows as a wrong number, a wrong phase as a
deadlock. Layouts are ignored, and so are the fences and the barriers among the threads of one partition.

    module = load("undivided.ops.latent_decode.gluon")    # its launches run here, on CPU tensors
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import operator
import random
import sys
import threading
import time
import types
from collections.abc import Iterator

import torch

TIMEOUT = 60.0
# Of this thread: `run`, the program it belongs to, and `products`, those in flight.
_thread = threading.local()


class Run:
    """One program of a launch."""

    def __init__(self, program, seed):
        self.program, self.random, self.error = program, random.Random(seed), None


class Block:
    """A distributed tensor; knows its layout because kernels ask `x.type.layout`."""

    def __init__(self, value, layout=None):
        self.value, self.dtype = value, value.dtype
        self.type = types.SimpleNamespace(layout=layout)

    def to(self, dtype):
        return Block(self.value.to(dtype), self.type.layout)

    def __getitem__(self, item):
        return Block(self.value[item], self.type.layout)

    def __neg__(self):
        return Block(-self.value, self.type.layout)


def _binary(function, swapped=False):
    def method(self, other):
        a, b = (_raw(other), self.value) if swapped else (self.value, _raw(other))
        return Block(function(a, b), self.type.layout)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(Block, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(Block, f"__r{_name}__", _binary(getattr(operator, _name), swapped=True))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Block, f"__{_name}__", _binary(getattr(operator, _name)))


def _raw(x):
    return x.value if isinstance(x, Block) else x


class Pointer:
    """Addresses in the storage of a tensor."""

    def __init__(self, storage, offset):
        self.storage, self.offset = storage, offset
        self.dtype = types.SimpleNamespace(element_ty=storage.dtype)

    @classmethod
    def to(cls, tensor):
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(torch.as_strided(tensor, (size,), (1,), 0), tensor.storage_offset())

    def __add__(self, other):
        return Pointer(self.storage, self.offset + _raw(other))


class Shared:
    """A tile of shared memory; NaN until it is written."""

    def __init__(self, value):
        self.value, self.dtype = value, value.dtype

    def index(self, i):
        return Shared(self.value[i])

    def permute(self, order):
        return Shared(self.value.permute(order))

    def slice(self, start, length, dim=0):
        return Shared(self.value.narrow(dim, start, length))

    def store(self, block):
        self.value.copy_(block.value)

    def load(self, layout):
        return Block(self.value.clone(), layout)


class Barrier:
    """An mbarrier: a phase ends when `count` threads have arrived and all expected bytes have landed."""

    def __init__(self):
        self.condition = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, num_bytes=0):
        with self.condition:
            self.bytes += num_bytes
            self.pending -= 1
            assert self.pending >= 0, "more arrivals than the barrier counts"
            self._settle()

    def land(self, num_bytes):
        with self.condition:
            self.bytes -= num_bytes
            self._settle()

    def _settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.condition.notify_all()

    def wait(self, parity):
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase % 2 != parity, TIMEOUT):
                raise TimeoutError("deadlock: nobody completed this phase of a barrier")


class Barriers:
    def __init__(self, number):
        self.items = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.items[i]


class Descriptor:
    """A matrix that the copy engine reads in boxes, with zeros outside."""

    def __init__(self, base, shape, strides, block_shape, layout):
        self.matrix, self.box, self.dtype = torch.as_strided(base, shape, strides), block_shape, base.dtype


def _bulk_copy(descriptor, coordinate, barrier, target):
    (row, column), (rows, columns) = coordinate, descriptor.box
    delay = _thread.run.random.choice((0.0, 1e-3))

    def land():
        time.sleep(delay)
        part = descriptor.matrix[row : row + rows, column : column + columns]
        target.value.zero_()
        target.value[: part.shape[0], : part.shape[1]] = part
        barrier.land(target.value.numel() * target.value.element_size())

    threading.Thread(target=land, daemon=True).start()


class Product:
    """An asynchronous product, computed when it is issued or when it is waited for."""

    def __init__(self, a, b, accumulator, use_acc):
        self.operands, self.accumulator, self.use_acc = (a, b), accumulator, use_acc
        self.type, self.result = accumulator.type, None
        if _thread.run.random.random() < 0.5:
            self.finish()

    def finish(self):
        if self.result is None:
            before = self.accumulator
            before = before.finish() if isinstance(before, Product) else before
            a, b = (x.value.float() for x in self.operands)
            self.result = Block(before.value + a @ b if self.use_acc else a @ b, self.type.layout)
        return self.result


def _products():
    if not hasattr(_thread, "products"):
        _thread.products = []
    return _thread.products


def _multiply(a, b, acc, *, use_acc=True, is_async=False):
    product = Product(a, b, acc, use_acc)
    _products().append(product)
    return product if is_async else _wait_for_products(0, [product])


def _wait_for_products(outstanding=0, deps=()):
    while len(_products()) > outstanding:
        product = _products().pop(0)
        if product.result is None and _thread.run.random.random() < 0.3:
            # Time for a copy to land where it must not yet.
            time.sleep(1e-3)
        product.finish()
    done = tuple(x.result or x if isinstance(x, Product) else x for x in deps)
    return done[0] if len(done) == 1 else done


def _warp_specialize(partitions, worker_num_warps, worker_num_regs):
    run = _thread.run

    def body(function, arguments):
        _thread.run = run
        try:
            function(*arguments)
        except BaseException as error:  # to be raised again by the launching thread
            run.error = run.error or error

    threads = [threading.Thread(target=body, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and run.error is None:
            thread.join(0.01)
    if run.error is not None:
        raise run.error


def _load(pointer, mask=None, other=0.0):
    if not isinstance(pointer.offset, torch.Tensor):
        return int(pointer.storage[pointer.offset])
    if mask is None:
        return Block(pointer.storage[pointer.offset])
    inside = mask.value.expand(pointer.offset.shape)
    values = pointer.storage[torch.where(inside, pointer.offset, 0)]
    return Block(torch.where(inside, values, torch.tensor(other, dtype=values.dtype)))


def _store(pointer, value, mask):
    inside = mask.value.expand(pointer.offset.shape)
    pointer.storage[pointer.offset[inside]] = value.value.expand(inside.shape)[inside].to(
        pointer.storage.dtype
    )


def _allocate(dtype, shape, layout):
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, float("nan")).to(dtype))


def _either(of_blocks, of_numbers):
    def function(a, b):
        if not isinstance(a, Block) and not isinstance(b, Block):
            return of_numbers(a, b)
        layout = next(x.type.layout for x in (a, b) if isinstance(x, Block))
        return Block(of_blocks(*(torch.as_tensor(_raw(x)) for x in (a, b))), layout)

    return function


def _mapped(function):
    return lambda x, *arguments: Block(function(x.value, *arguments), x.type.layout)


def _where(condition, a, b):
    a, b = (x.value if isinstance(x, Block) else torch.tensor(x) for x in (a, b))
    return Block(torch.where(condition.value, a, b.to(a.dtype)), condition.type.layout)


def _language() -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    gl.constexpr = lambda value: value
    for name in ("float16", "float32", "int32", "int64"):
        setattr(gl, name, getattr(torch, name))
    for name in ("Blocked", "NVMMADistributed", "NVMMAShared", "SwizzledShared", "Slice", "DotOperand"):
        setattr(gl, f"{name}Layout", lambda *arguments: None)
    gl.program_id = lambda axis: _thread.run.program[axis]
    gl.arange = lambda start, end, layout: Block(torch.arange(start, end), layout)
    gl.zeros = lambda shape, dtype, layout: Block(torch.zeros(shape, dtype=dtype), layout)
    gl.full = lambda shape, value, dtype, layout: Block(torch.full(shape, value, dtype=dtype), layout)
    gl.zeros_like, gl.full_like = _mapped(torch.zeros_like), _mapped(torch.full_like)
    gl.max, gl.sum = _mapped(torch.amax), _mapped(torch.sum)
    gl.exp2, gl.log2 = _mapped(torch.exp2), _mapped(torch.log2)
    gl.maximum, gl.minimum = _either(torch.maximum, max), _either(torch.minimum, min)
    gl.where, gl.load, gl.store = _where, _load, _store
    gl.convert_layout = lambda x, layout: Block(x.value, layout)
    gl.cdiv = lambda a, b: -(-a // b)
    gl.cast = lambda x, dtype: x
    gl.static_range = range
    gl.allocate_shared_memory = _allocate
    gl.barrier = lambda: None
    gl.inline_asm_elementwise = lambda *arguments, **options: None
    gl.warp_specialize = _warp_specialize
    return gl


def _hopper() -> types.ModuleType:
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _multiply, _wait_for_products
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, num_bytes: barrier.arrive(num_bytes),
        arrive=lambda barrier: barrier.arrive(),
        wait=lambda barrier, phase: barrier.wait(phase),
    )
    hopper.tma = types.SimpleNamespace(async_copy_global_to_shared=_bulk_copy)
    return hopper


class Kernel:
    """What `gluon.jit` makes of a function: called by another one, or launched over a grid."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **options):
            arguments = [Pointer.to(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for seed, program in enumerate(itertools.product(*map(range, grid))):
                _thread.run = Run(program, seed)
                self.function(*arguments, **options)

        return launch


def _jit(function=None, **options):
    return Kernel if function is None else Kernel(function)


@contextlib.contextmanager
def _modules(replacements: dict[str, types.ModuleType | None]) -> Iterator[None]:
    """Replaces modules, or (None) lets them be imported anew; puts everything back at the end."""
    before = {name: sys.modules.get(name) for name in replacements}
    # A module is found in the table of modules and as an attribute of its package.
    places = [(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in replacements]
    attributes = [(package, leaf, vars(package).get(leaf)) for package, leaf in places if package]
    _put_modules(replacements)
    for package, leaf, _ in attributes:
        vars(package).pop(leaf, None)
    try:
        yield
    finally:
        _put_modules(before)
        for package, leaf, module in attributes:
            vars(package).pop(leaf, None)
            if module is not None:
                setattr(package, leaf, module)


def _put_modules(modules: dict[str, types.ModuleType | None]) -> None:
    for name, module in modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def load(name: str, *parts: str) -> types.ModuleType:
    """Imports a module of Gluon kernels, and the modules it is made of, anew: their launches run here."""
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = _jit, _language()
    host = types.ModuleType("triton.experimental.gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    replacements = {module.__name__: module for module in (gluon, gluon.language, _hopper(), host)}
    for package in ("triton.experimental", name.rpartition(".")[0]):
        importlib.import_module(package)
    with _modules(replacements | dict.fromkeys((name, *parts))):
        return importlib.import_module(name)
