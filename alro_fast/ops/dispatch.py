"""Which backend serves which tensors, and what every custom op of this folder has in common."""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import AlroFastError
from .backends import eager

log = logging.getLogger("alro_fast.ops")

BACKENDS = ("triton", "cpp", "eager")

_PREFERRED = {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")}


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Names of the backends that can serve tensors of this device and dtype, preferred ones first."""
    device = torch.device(device)
    preferred = _PREFERRED.get(device.type, ("eager",))
    names = [*preferred, *(name for name in BACKENDS if name not in preferred)]
    return [name for name in names if _reason_against(name, device, dtype) is None]


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that serves `name` ("auto" or one of BACKENDS) for tensors of this device and dtype."""
    return _resolve(name, device.type, dtype)


@functools.cache
def _resolve(name: str, device_type: str, dtype: torch.dtype) -> ModuleType:
    device = torch.device(device_type)
    if name == "auto":
        name = available_backends(device, dtype)[0]
        log.debug("backend %s serves %s tensors on %s", name, str(dtype).removeprefix("torch."), device_type)
    else:
        check_backend(name)
        reason = _reason_against(name, device, dtype)
        if reason is not None:
            raise AlroFastError(
                f"backend {name!r} cannot serve {dtype} tensors on {device_type}: {reason}; "
                f"use one of {available_backends(device, dtype)} or 'auto'"
            )
    return importlib.import_module(f".backends.{name}", __package__)


def head_server(backend: str, hidden: Tensor, function: str, softcap: float | None) -> ModuleType:
    """The module that serves a call of `function` (of HEAD_FUNCTIONS): the backend's own or, under "auto", eager."""
    module = resolve_backend(backend, hidden.device, hidden.dtype)
    return _or_eager(backend, module, module.SERVES.declines_head(function, softcap))


def list_server(
    backend: str, logits: Tensor, *, form: str, divergence: str, mask_emitted: bool, longest: int
) -> ModuleType:
    """The module that serves a call of `listwise`: the backend's own or, under "auto", eager."""
    module = resolve_backend(backend, logits.device, logits.dtype)
    return _or_eager(backend, module, module.SERVES.declines_lists(form, divergence, mask_emitted, longest))


def _or_eager(backend: str, module: ModuleType, declined: str | None) -> ModuleType:
    if declined is None:
        return module
    if backend != "auto":
        raise AlroFastError(f"backend {backend!r} does not serve {declined}: use 'auto' or 'eager'")
    _say_once_declined(module.__name__.rpartition(".")[2], declined)
    return eager


@functools.cache
def _say_once_declined(name: str, declined: str) -> None:
    log.info("backend eager serves %s, which %s does not", declined, name)


def check_backend(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise AlroFastError(f"backend is {name!r}; expected 'auto' or one of {', '.join(BACKENDS)}")


def _reason_against(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        module = importlib.import_module(f".backends.{name}", __package__)
    except ImportError as error:
        return f"not installed here ({error})"
    reason: str | None = module.unavailable(device, dtype)
    return reason


@contextlib.contextmanager
def as_given(tensor: Tensor) -> Iterator[None]:
    """Backends compute in the dtypes they are given, on the device of `tensor`: Triton launches on the current one.

    float32 is float32: TF32, which Triton's kernels do not use, is off for the library's products beside them as well.
    """
    device = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    products: Any = torch.backends.cuda.matmul
    allowed = products.fp32_precision
    with torch.autocast(tensor.device.type, enabled=False), device:
        if allowed != "tf32":
            yield
            return
        products.fp32_precision = "ieee"
        try:
            yield
        finally:
            products.fp32_precision = allowed


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Custom ops return no None, and no tensor twice."""
    return like.new_empty(0) if tensor is None else tensor


def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise AlroFastError(
        "double backward through alro_fast ops is not supported: call backward without create_graph, or take the loss "
        "from alro_fast.reference, which has derivatives of every order"
    )


def result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
