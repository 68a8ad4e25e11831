"""A GPU that stands in: its tensors say that they lie there, compute on the CPU, and refuse what a real GPU refuses.

Every operation looks on which side its tensors are; one that mixes them raises as CUDA does, and so does a way to numpy
without `.cpu()`. What lies there is counted by the storage, in blocks of 512 bytes as torch's allocator does, against a
limit that can run out. autocast computes the operations in float32 that it computes so on a GPU. What only hardware can
show stays open: speed, the work space of kernels, fragments between blocks, and the rounding of other kernels.

Without numbers it holds a network of any size: tensors there have a shape and lie nowhere, what is asked of them is
made up (1.0, a million, True), and every mask selects everything. What is counted is then the memory alone.
"""
import contextlib
import functools
import threading
import weakref

import torch
import torch.utils.checkpoint
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten, F, Tensor = torch.ops.aten, torch.nn.functional, torch.Tensor
BLOCK = 512  # bytes
# in bf16 on the CPU and in float32 on a GPU; https://docs.pytorch.org/docs/stable/amp.html, the part of its list that a
# network and its losses call
IN_FLOAT32 = {
    F.layer_norm,
    torch.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.softplus,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.normalize,
    *(
        getattr(place, name)
        for place in (torch, Tensor)
        for name in ("exp", "expm1", "log", "log1p", "pow", "rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm")
    ),
    Tensor.__pow__,
    torch.linalg.norm,
    torch.linalg.vector_norm,
}


class Memory:
    """The bytes that lie on the stand-in now, and at most."""

    def __init__(self):
        self.limit, self.now, self.peak, self._known, self._lock = 1 << 60, 0, 0, {}, threading.RLock()
        self.numbers = True  # False: only shapes

    @property
    def place(self) -> torch.device:
        """Where the numbers of its tensors are."""
        return CPU if self.numbers else torch.device("meta")

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is gone; raises torch's OutOfMemoryError beyond the limit."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        with self._lock:
            if key in self._known:
                return
            if self.now + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                    f"{self.limit / 2**30:.2f} GiB"
                )
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        with self._lock:
            del self._known[key]
            self.now -= size


MEMORY = Memory()


class OnGPU(torch.Tensor):
    """A tensor of the stand-in; its numbers are `inner`, on the CPU. Autograd and C++ take it for one of the CPU: what
    asks in Python is told otherwise.
    """

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        MEMORY.add(inner)
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CPU,
        )
        self.inner = inner
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"OnGPU({self.inner!r})"

    # by this Module.to knows that it must exchange tensors, and parameters stay the objects that they were
    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["inner"])

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)  # in a file as one that is read with map_location="cpu"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (answer := ANSWERS.get(func)) is not None:
            return answer(*args, **kwargs)
        if func == Tensor.data.__set__:
            args[0].inner = args[1].inner
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = each(
                lambda t: t.float() if isinstance(t, OnGPU) and t.dtype == torch.bfloat16 else t, (args, kwargs)
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


def wanted(args: tuple, kwargs: dict) -> tuple:
    """(device, dtype, memory format) that `Tensor.to` is asked for; None each where it is not."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device, args[0].dtype, None
    device, dtype, _, form = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    return device, dtype, form


def to(tensor, *args, **kwargs):
    """`Tensor.to`: another tensor only where something changes."""
    device, dtype, form = wanted(args, kwargs)
    device = tensor.device if device is None else GPU if device.type == "cuda" else device
    if device == tensor.device and dtype in (None, tensor.dtype) and form is None and not kwargs.get("copy"):
        return tensor
    if device != tensor.device:
        tensor = Move.apply(tensor, device)
    with torch._C.DisableTorchFunctionSubclass():
        return aten._to_copy(tensor, dtype=dtype or tensor.dtype, **({} if form is None else {"memory_format": form}))


class Move(torch.autograd.Function):
    """A copy on another side, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.back = GPU if isinstance(tensor, OnGPU) else tensor.device
        return move(tensor, device)

    @staticmethod
    def backward(ctx, gradient):
        return move(gradient, ctx.back), None


def move(tensor, device):
    """The numbers of a tensor on another side."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        inner = (tensor.inner if isinstance(tensor, OnGPU) else tensor).detach()
        if device.type == "cuda":
            return OnGPU(inner.clone() if MEMORY.numbers else inner.to("meta"))
        return (
            inner.to("meta")
            if device.type == "meta"
            else inner.clone()
            if MEMORY.numbers
            else torch.ones(inner.shape, dtype=inner.dtype)
        )


def refuse(*_, **__):
    raise TypeError(
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
    )


ANSWERS = {
    Tensor.device.__get__: lambda t: GPU,
    Tensor.is_cuda.__get__: lambda t: True,
    Tensor.is_cpu.__get__: lambda t: False,
    Tensor.get_device: lambda t: 0,
    Tensor.to: to,
    Tensor.cpu: lambda t, *_, **__: to(t, CPU),
    Tensor.cuda: lambda t, *_, **__: t,
    Tensor.numpy: refuse,
    Tensor.__array__: refuse,
    Tensor.tolist: lambda t: t.cpu().tolist(),
    Tensor.__format__: lambda t, spec: format(t.cpu(), spec),
    Tensor.data_ptr: lambda t: t.inner.data_ptr(),
    Tensor.untyped_storage: lambda t: t.inner.untyped_storage(),
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


def each(change, tree):
    """A nest of tuples, lists and dicts with all else changed."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([each(change, item) for item in tree])  # torch's own results that have names too
    return {name: each(change, item) for name, item in tree.items()} if isinstance(tree, dict) else change(tree)


def tensors_of(tree) -> list:
    found = []
    each(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, tree)
    return found


def inner_of(tree, met: list):
    """A nest with the numbers of its tensors in place of those that lie on the GPU; `met` receives all its tensors."""
    kind = type(tree)
    if kind is OnGPU:
        met.append(tree)
        return tree.inner
    if kind is tuple or kind is list:
        return kind([inner_of(item, met) for item in tree])
    if isinstance(tree, torch.Tensor):
        met.append(tree)
    elif isinstance(tree, (tuple, list, dict)):
        return each(lambda leaf: inner_of(leaf, met), tree)
    return tree


def execute(func, args, kwargs):
    """One operation: look where its tensors are, compute on the CPU, and put the result where it belongs."""
    met: list = []
    bare_args, bare_kwargs = inner_of(args, met), {name: inner_of(value, met) for name, value in kwargs.items()}
    wrapped = {id(t.inner): t for t in met if type(t) is OnGPU}
    here = bool(wrapped)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if here and asked == "cpu":  # C++ has asked, who takes the stand-in for the CPU; what a person asks is `to` above
        asked = "cuda"
    if here and any(type(t) is not OnGPU for t in met) and func not in COPIES:
        indexed = func in INDEXED  # an index may lie on the CPU, what it points into may not
        beside = [
            t
            for t in tensors_of((args[:1], args[2:], kwargs) if indexed else (args, kwargs))
            if not isinstance(t, OnGPU) and (t.dim() or indexed and t is args[0])
        ]
        if beside:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func}, on the CPU: {[tuple(t.shape) for t in beside]})"
            )
    generator = kwargs.get("generator")
    if generator is not None and "cuda" in (asked, here and "cuda") and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}' ({func})")
    if asked == "cuda":
        bare_kwargs["device"] = MEMORY.place
    compute = func if MEMORY.numbers or not (here or asked == "cuda") else functools.partial(make_up, func)
    result = compute(*bare_args, **bare_kwargs)
    there = asked == "cuda" or here and func is not aten.copy_.default  # copy_ writes where it is told to

    def put(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return wrapped[id(leaf)] if id(leaf) in wrapped else OnGPU(leaf) if there else leaf

    return put(result) if isinstance(result, torch.Tensor) else each(put, result)


def make_up(func, *args, **kwargs):
    """An operation on shapes."""
    if func is aten._local_scalar_dense.default:
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1_000_000
    if func is aten.equal.default:
        return True
    if func is aten._fused_adamw_.default:  # in place: nothing comes to it
        return None
    if func is aten.copy_.default and args[0].device.type == "cpu":
        return args[0].fill_(1)
    if func is aten.nonzero.default:
        return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
    if func is aten.masked_select.default:
        return torch.empty(args[0].numel(), dtype=args[0].dtype, device="meta")
    if func in INDEXED:
        places = [
            [torch.empty(i.numel(), dtype=torch.int64, device="meta")] * i.dim()
            if i is not None and i.dtype == torch.bool
            else [i if i is None else i.to("meta")]
            for i in args[1]
        ]
        return func(args[0], sum(places, []), *args[2:], **kwargs)
    return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Sees what is made on the GPU from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Hears a person ask for `cuda`, before C++ looks for the hardware."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.cuda:
            return to(args[0], GPU)
        if not kwargs and func is not Tensor.to:
            return func(*args)
        kwargs = dict(kwargs or {})
        if func is Tensor.to and not isinstance(args[0], OnGPU):
            device = wanted(args[1:], kwargs)[0]
            return (
                to(args[0], *args[1:], **kwargs)
                if device is not None and device.type == "cuda"
                else func(*args, **kwargs)
            )
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                return to(func(*args, **kwargs | {"device": None}), GPU)
            kwargs["device"] = GPU
        return func(*args, **kwargs)


def backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    """`Tensor.backward` on the direct way; on torch's own, what is computed again in the backward pass would ask C++
    where it is.
    """
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    _engine_run_backward(
        (tensor,), (gradient,), bool(retain_graph or create_graph), create_graph, tuple(inputs or ()),
        allow_unreachable=True, accumulate_grad=True,
    )


class Autocast(torch.autocast):
    """autocast for the GPU, where C++ sees the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def standing_in(monkeypatch, limit: int = 1 << 60, bf16: bool = True, numbers: bool = True):
    """torch finds one GPU of `limit` bytes while inside, with tensors that hold numbers or only shapes; gives its
    Memory.
    """
    cuda, state = torch.cuda, [torch.zeros(16, dtype=torch.uint8)]
    MEMORY.limit, MEMORY.peak, MEMORY.numbers = limit, MEMORY.now, numbers
    answers = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "set_device": None, "synchronize": None, "empty_cache": None, "get_device_name": "a stand-in",
        "get_device_capability": (9, 0), "is_bf16_supported": bf16, "manual_seed": None, "manual_seed_all": None,
    }
    for name, value in answers.items():
        monkeypatch.setattr(cuda, name, lambda *_, value=value, **__: value)
    calls = {
        "memory_allocated": lambda: MEMORY.now,
        "memory_reserved": lambda: MEMORY.now,
        "max_memory_allocated": lambda: MEMORY.peak,
        "mem_get_info": lambda: (MEMORY.limit - MEMORY.now, MEMORY.limit),
        "reset_peak_memory_stats": lambda: setattr(MEMORY, "peak", MEMORY.now),
        "get_rng_state": lambda: state[0].clone(),
        "get_rng_state_all": lambda: [state[0].clone()],
    }
    for name, call in calls.items():
        monkeypatch.setattr(cuda, name, lambda *_, call=call, **__: call())
    monkeypatch.setattr(cuda, "set_rng_state", lambda one, device=0: state.__setitem__(0, one.clone()))
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setitem(
        torch.utils.checkpoint._allowed_determinism_checks_to_fns,
        "default",
        lambda t: {"shape": t.shape, "dtype": t.dtype},
    )
    for place in (torch, torch.amp, torch.amp.autocast_mode):
        monkeypatch.setattr(place, "autocast", Autocast)
    with Operations(), Names():
        yield MEMORY
