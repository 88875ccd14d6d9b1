"""A device that is not there: tensors of the CPU that say they are on a GPU, and act like it.

`install` turns this process into one with such a device. Its tensors hold real numbers in memory, so forward passes,
backward passes, optimizers, hooks, views, DeepSpeed and the exchange between ranks all run as they are; only the answer
to "on which device are you?" is another, and it is kept with each tensor's storage. Every operation that torch carries
out, also in a backward pass and in an optimizer, goes through `OtherDevice`, which refuses what a GPU refuses: tensors
of both devices in one operation (but single numbers and indices on the CPU, where CUDA admits them), and numpy.

Why this and no other trick: on torch's ``meta`` device tensors have no numbers, so whatever asks for one (a norm, the
rows of an expert) stops there; fake tensors can do no backward pass on a GPU that is not there; a backend of one's own
needs a compiler, and `nn.Module.to` would make new parameters for it, without what DeepSpeed notes on them.

It also notes where the process waits for the device, as `WAITS`: numbers that Python asks for, results whose size
depends on the data, and copies that are not asynchronous. It knows no streams, no kernels, no memory of a GPU and no
rounding of one, and nothing that libraries do without torch's dispatcher.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER, CPU = torch.device("cuda", 0), torch.device("cpu")
ANYWHERE = torch.device("meta")  # what an operation makes for itself, which on a GPU it makes there
WAITS: Counter[str] = Counter()
"""How often this process waited for the device, by the place in hpc_cpd, in the thread that `install` was called in."""

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_ASK_FOR_NUMBERS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.bincount.default,  # on a GPU it asks for the least and the greatest number
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}
_FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
]
_METHODS = ["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"]
_PACKAGE = str(Path(__file__).parents[1] / "hpc_cpd")
_TO = torch.Tensor.to


def install() -> None:
    """From now on this process has the device `OTHER`, also in threads that it starts. There is no way back."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):  # what DeepSpeed moves things to
        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def current_device_name(self) -> str:
            return str(OTHER)

        def on_accelerator(self, tensor: Tensor) -> bool:
            return device_of(tensor) == OTHER

    class Autocast(torch.autocast):  # that of a GPU does nothing where torch was built without
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    set_accelerator(Accelerator())
    torch.autocast = Autocast  # type: ignore[misc]
    tensor: Any = torch.Tensor
    tensor.device = property(device_of)
    tensor.is_cpu = property(lambda self: device_of(self) == CPU)
    tensor.is_cuda = property(lambda self: device_of(self) == OTHER)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # the exchange between ranks asks
    tensor.to, tensor.numpy, tensor.tolist = _to, _refused(tensor.numpy), _waited_for(tensor.tolist)
    tensor.cpu, tensor.cuda = lambda self: _to(self, CPU), lambda self: _to(self, OTHER)
    tensor.pin_memory = lambda self: self.clone()
    for name in _METHODS:
        setattr(tensor, name, _factory(getattr(tensor, name)))
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    submit = ThreadPoolExecutor.submit

    def submit_there(self: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any, **others: Any) -> Any:
        return submit(self, _there(work), *arguments, **others)

    ThreadPoolExecutor.submit = submit_there  # type: ignore[method-assign, assignment]
    OtherDevice().__enter__()


def device_of(tensor: Tensor) -> torch.device:
    """Where `tensor` is, or would be."""
    place = _place(tensor)
    return CPU if place == ANYWHERE and not tensor.is_meta else place


def _place(tensor: Tensor) -> torch.device:
    tensor = _plain(tensor)
    real: torch.device = torch._C.TensorBase.device.__get__(tensor)
    return getattr(tensor.untyped_storage(), "pretended", CPU) if real == CPU else real


def _plain(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # within torch.func
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class OtherDevice(TorchDispatchMode):
    """Every operation of torch: refuses what a GPU refuses, and notes on which device its results are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors = [each for each in tensors if _place(each) != ANYWHERE]
        places = {_place(each) for each in tensors}
        home = _home(func, args, tensors) if len(places) > 1 else next(iter(places), ANYWHERE)
        if func in _COPIES:
            _note_copy(device_of(args[1]), device_of(args[0]), args[2] if len(args) > 2 else False)
        elif home == OTHER and (func in _ASK_FOR_NUMBERS or (func in _INDEXING and _by_flags(args[1]))):
            _note_wait()
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not hasattr(leaf.untyped_storage(), "pretended"):
                _put(leaf, home)
        return result


def _home(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation whose tensors are on both. Raises RuntimeError as CUDA would."""
    if func in _COPIES:
        return device_of(args[0])
    here = [tensor for tensor in tensors if device_of(tensor) == CPU]
    numbers_may = torch.Tag.pointwise in func.tags or func in _INDEXING or "fill" in func.__name__
    indices = [index for index in args[1] if index is not None] if func in _INDEXING else []
    if indices and device_of(args[0]) == OTHER and any(device_of(index) == CPU for index in indices):
        _note_wait()  # they are copied
        here = [tensor for tensor in here if not any(tensor is index for index in indices)]
    if all(tensor.dim() == 0 and numbers_may for tensor in here):
        return OTHER
    listed = ", ".join(f"{list(tensor.shape)} on {device_of(tensor)}" for tensor in tensors)
    raise RuntimeError(f"expected all tensors to be on the same device, but {func} has {listed}")


def _by_flags(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _put(tensor: Tensor, device: torch.device) -> Tensor:
    if torch._C.TensorBase.device.__get__(tensor) == CPU:
        _plain(tensor).untyped_storage().pretended = device  # type: ignore[attr-defined]
    return tensor


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.source = device_of(tensor)
        _note_copy(ctx.source, device, non_blocking)
        return _put(tensor.detach().clone(), device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _to(gradients[0], ctx.source), None, None


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    flags = [value for value in args if isinstance(value, bool)]
    for value in (*args, kwargs.pop("other", None)):
        if isinstance(value, Tensor):
            device, dtype = device_of(value), value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str)):
            device = value
    non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
    device = device_of(self) if device is None else torch.device(device)
    device = OTHER if device.type == "cuda" else device
    if device == device_of(self) or device.type == "meta":
        kwargs |= {"dtype": self.dtype if dtype is None else dtype} | (
            {"device": device} if device.type == "meta" else {}
        )
        return _TO(self, **kwargs)
    moved: Tensor = _Move.apply(self, device, non_blocking)
    return moved if dtype is None else _TO(moved, dtype=dtype)


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        like = make.__name__.endswith("_like") or make.__name__.startswith("new_")
        if (device is None and like) or (device is not None and torch.device(device).type == "meta"):
            return make(*args, **kwargs, **({} if device is None else {"device": device}))
        tensor, device = make(*args, **kwargs), CPU if device is None else torch.device(device)
        device = OTHER if device.type == "cuda" else device
        if make.__name__ in ("tensor", "new_tensor"):
            _note_copy(CPU, device, False)
        return _put(tensor, device)

    return made


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if device_of(self) == OTHER:
            raise TypeError(f"can't convert {OTHER} device type tensor to numpy")
        return method(self, *args, **kwargs)

    return refused


def _waited_for(method: Callable[..., Any]) -> Callable[..., Any]:
    def waited_for(self: Tensor) -> Any:
        if device_of(self) == OTHER:
            _note_wait()
        return method(self)

    return waited_for


def _there(work: Callable[..., Any]) -> Callable[..., Any]:
    def done(*args: Any, **kwargs: Any) -> Any:
        with OtherDevice():
            return work(*args, **kwargs)

    return done


def _note_copy(source: torch.device, target: torch.device, non_blocking: bool) -> None:
    if source != target and not (non_blocking and target == OTHER):
        _note_wait()


def _note_wait() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None:
        file = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
        WAITS[f"{file}:{frame.f_lineno} {frame.f_code.co_name}"] += 1
