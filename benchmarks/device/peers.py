"""Muon in PyTorch, where it is installed: as it ships, and stacked and compiled."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from orthax.linalg import coefficients

Step = Callable[[], Any]
Make = Callable[[Any, float], tuple[Step, Callable[[], int]]]


def available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def optimizers() -> dict[str, Make]:
    """By name: a function of gradients and rate to a step and its peak memory; {} without PyTorch.

    The trees are those of `device.updates`: kernels are Muon's, all else is AdamW's.
    """
    if not available():
        return {}
    return {"torch.optim.Muon": _shipped, "torch, stacked and compiled": _stacked}


def _tensors(gradients: Any) -> tuple[list[Any], list[Any]]:
    """Parameters with these gradients: the matrices, and the rest."""
    import torch  # type: ignore[reportMissingImports]

    matrices, rest = [], []
    for path, leaf in jax.tree.leaves_with_path(gradients):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[str(leaf.dtype)]
        grad = torch.from_numpy(np.array(leaf, np.float32)).to(device, dtype)
        parameter = torch.nn.Parameter(torch.ones_like(grad))
        parameter.grad = grad
        (matrices if path[-1].key == "kernel" else rest).append(parameter)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return matrices, rest


def _waiting(step: Callable[[], None]) -> tuple[Step, Callable[[], int]]:
    """The step, whose result `jax.block_until_ready` can wait for; and the peak memory."""
    import torch  # type: ignore[reportMissingImports]

    class Finished:
        def block_until_ready(self) -> "Finished":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return self

    def run() -> Finished:
        step()
        return Finished()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    return run, peak


def _shipped(gradients: Any, rate: float) -> tuple[Step, Callable[[], int]]:
    import torch  # type: ignore[reportMissingImports]

    matrices, rest = _tensors(gradients)
    steps = [torch.optim.Muon(matrices, lr=rate, weight_decay=0.0).step, _adamw(rest, rate)]

    def step() -> None:
        for own in steps:
            own()

    return _waiting(step)


def _adamw(parameters: list[Any], rate: float) -> Callable[[], Any]:
    import torch  # type: ignore[reportMissingImports]

    fused = torch.cuda.is_available()
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=fused).step


def _stacked(gradients: Any, rate: float) -> tuple[Step, Callable[[], int]]:
    """Muon as large trainings write it: equal shapes stacked, bfloat16, compiled per shape."""
    import torch  # type: ignore[reportMissingImports]

    matrices, rest = _tensors(gradients)
    momenta = [torch.zeros_like(p) for p in matrices]
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(matrices):
        groups.setdefault(tuple(p.shape), []).append(i)
    ((a, b, c), *_) = coefficients.MUON

    def direction(x: Any) -> Any:
        tall = x.shape[-2] > x.shape[-1]
        x = (x.mT if tall else x).bfloat16()
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in coefficients.MUON:
            r = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(r, r, r, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    compiled = torch.compile(direction, dynamic=False)
    others = _adamw(rest, rate)

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in matrices]
        torch._foreach_lerp_(momenta, grads, 0.05)
        nesterov = torch._foreach_lerp(grads, momenta, 0.95)
        for shape, members in groups.items():
            found = compiled(torch.stack([nesterov[i] for i in members]))
            scale = 0.2 * max(shape) ** 0.5
            moved = [u.to(matrices[i].dtype) for u, i in zip(found.unbind(), members, strict=True)]
            torch._foreach_add_([matrices[i] for i in members], moved, alpha=-rate * scale)
        others()

    return _waiting(step)
