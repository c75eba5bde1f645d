"""One comparison for every op, and the swap that gives any model its eager baseline.

The tolerance is the house's only one: our error against float64, bounded by the error eager makes
in the same dtype on the same rounded inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tilewright import ops, reference


@contextmanager
def eager() -> Iterator[None]:
    """Run every op through its reference twin: the baseline for whole models."""
    fast = {name: getattr(ops, name) for name in ops.__all__}
    try:
        vars(ops).update({name: getattr(reference, name) for name in fast})
        yield
    finally:
        vars(ops).update(fast)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A float tensor as a leaf of `dtype` with its strides kept; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    # an expanded dimension is copied once and expanded again
    once = x.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
    storage = torch.empty_strided(once.size(), once.stride(), dtype=dtype, device=x.device)
    storage.copy_(once)
    return storage.expand(x.size()).requires_grad_(x.requires_grad)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def run(fn: Callable, inputs: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Outputs of fn, then the gradient of each input that requires one, in float64.

    The output gradients are seeded normals, the same for every dtype.
    """
    generator = torch.Generator().manual_seed(1)
    outputs = _outputs(fn(*inputs, **kwargs))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    grads: tuple[Tensor, ...] = ()
    if leaves:
        live = [out for out in outputs if out.requires_grad]
        douts = [torch.randn(out.shape, generator=generator).to(out) for out in live]
        grads = torch.autograd.grad(live, leaves, douts)
    return [t.detach().double() for t in (*outputs, *grads)]


def _row_error(x: Tensor, truth: Tensor) -> Tensor:
    """rms(x - truth) / rms(truth), per row of the last dimension; 0 where both vanish."""
    norm = torch.linalg.vector_norm
    x, truth = torch.atleast_1d(x), torch.atleast_1d(truth)
    return norm(x - truth, dim=-1) / norm(truth, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def errors(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest absolute error, and the worst row's relative RMS error."""
    if ours.numel() == 0:
        return 0.0, 0.0
    return (ours - truth).abs().max().item(), _row_error(ours, truth).max().item()


def assert_within(ours: Tensor, eager: Tensor, truth: Tensor, eps: float, name: str) -> None:
    """The tolerance rule, on float64 tensors:

    max|ours - truth| <= 2 max|eager - truth| + 4 eps max|truth|, and no row's relative RMS error
    above twice the worst of eager's plus eps (a wrong half of the rows hides under the first bound
    alone).  Non-finite positions match exactly.
    """
    if ours.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}")
    finite = truth.isfinite()
    if not torch.equal(ours[~finite], truth[~finite]) and not (
        torch.equal(ours.isnan(), truth.isnan())
        and torch.equal(ours[ours.isinf()], truth[truth.isinf()])
    ):
        raise AssertionError(f"{name}: non-finite positions differ")
    ours, eager, truth = (torch.where(finite, t, 0.0) for t in (ours, eager, truth))
    if ours.numel() == 0:
        return
    (error, row_error), (eager_error, eager_row) = errors(ours, truth), errors(eager, truth)
    bound = 2 * eager_error + 4 * eps * truth.abs().max().item()
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3e} > {bound:.3e}")
    row_bound = 2 * eager_row + eps
    if not row_error <= row_bound:
        raise AssertionError(f"{name}: row error {row_error:.3e} > {row_bound:.3e}")


def assert_matches_reference(
    op: Callable, reference: Callable, *inputs: Any, dtype: torch.dtype, **kwargs: Any
) -> None:
    """Outputs and gradients of `op` against `reference` in float64, bounded by eager in `dtype`.

    Float tensors are rounded to `dtype` first; those with requires_grad get their gradient compared.
    """
    eps = torch.finfo(dtype).eps
    rounded = [cast(x, dtype) for x in inputs]
    truth = run(reference, [cast(x, torch.float64) for x in rounded], kwargs)
    eager = run(reference, [cast(x, dtype) for x in rounded], kwargs)
    ours = run(op, [cast(x, dtype) for x in rounded], kwargs)
    for i, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert_within(o, e, t, eps, f"result {i} ({dtype})")
