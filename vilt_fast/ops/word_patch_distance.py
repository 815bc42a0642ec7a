"""word_patch_distance: hidden states to transport distance: cosine costs, IPOT, <C, T>.

What the backward has to keep besides its inputs is T, as ``state``: the plan itself [B, M, N] (cpp, unless it is an
output anyway), or what T can be made from again, [B, M + N, 2] (triton, see kernels/word_patch_distance.py), so that
nothing of the plan's size exists. T is constant:

    dC_ij = g T_ij;   d text_i = -g (I - t^ t^t) sum_j T_ij v^_j / |t_i|,   t^ = t / |t|, no projection below |t| = 1e-5
"""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op

_NAME = "word_patch_distance"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    rows: int  #: M
    columns: int  #: N
    hidden: int  #: D
    requires_grad: bool = False


def _fake(
    text: Tensor, image: Tensor, text_pad: Tensor, image_pad: Tensor, beta: float, iterations: int, inner: int,
    return_plan: bool, backend: str,
):  # fmt: skip
    distance = text.new_empty(len(text), dtype=torch.float32)
    whole = (*text.shape[:2], image.shape[1])
    state = (len(text), text.shape[1] + image.shape[1], 2) if backend == "triton" else (0,) if return_plan else whole
    return (distance, distance.new_empty(whole if return_plan else (0,))), (distance.new_empty(state),)


def _fake_backward(
    needs: list[bool], grad_distance: Tensor, text: Tensor, image: Tensor, text_pad: Tensor, image_pad: Tensor,
    plan: Tensor, state: Tensor, beta: float, iterations: int,
):  # fmt: skip
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (text, image)), ()


def _validate(text, image, text_pad, image_pad, beta, iterations, inner):
    _check.shapes(
        _NAME, text=(text, "B M D"), image=(image, "B N D"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N")
    )
    if len(text) < 1:
        raise ValueError(f"{_NAME}: text has shape {list(text.shape)}: no sample; expected B >= 1.")
    _check.dtypes(_NAME, _check.FLOATS, text=text)
    _check.same_dtype(_NAME, text=text, image=image)
    _check.padding_masks(_NAME, text_pad=text_pad, image_pad=image_pad)
    _check.same_device(_NAME, text=text, image=image, text_pad=text_pad, image_pad=image_pad)
    _check.positive(_NAME, beta=beta)
    _check.counts(_NAME, iterations=iterations, inner=inner)


def _validate_backward(grad_distance, text, image, text_pad, image_pad, plan, state, backend):
    _validate(text, image, text_pad, image_pad, 1.0, 1, 1)
    _check.shapes(_NAME, text=(text, "B M D"), grad_distance=(grad_distance, "B"))
    plan_shape, sums = (*text.shape[:2], image.shape[1]), (len(text), text.shape[1] + image.shape[1], 2)
    name, given = ("state", state) if backend == "triton" or state.dim() > 1 else ("plan", plan)
    wanted = sums if backend == "triton" else plan_shape
    if given.shape != wanted:
        raise ValueError(f"{_NAME}: {name} has shape {list(given.shape)}, expected {list(wanted)}.")


def _facts(text, image, requires_grad):
    return Facts(
        device=text.device.type, dtype=text.dtype, rows=text.shape[1], columns=image.shape[1], hidden=text.shape[2],
        requires_grad=requires_grad,
    )  # fmt: skip


_OP = Op(
    _NAME, _fake, _fake_backward,
    outputs=("distance", "plan"), kept=("state",), differentiable=("text", "image"),
    differentiable_outputs=("distance",), validate=_validate, facts=_facts, again=None,
    validate_backward=_validate_backward,
)  # fmt: skip


def word_patch_distance(
    text: Tensor,
    image: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
    return_plan: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Optimal transport distance between words and patches: cosine cost C, IPOT plan T, ``<C, T>``.

    Args:
        text: [B, M, D], image: [B, N, D] hidden states of one floating dtype; text_pad, image_pad: bool, True where
            padded. Padded rows are never read. beta, iterations, inner: see :func:`ipot`.
        return_plan: also return T [B, M, N].

    Returns:
        distance [B] in float32 (float64 for float64 inputs), 0 for a sample without real tokens or patches.
        Differentiable in text and image with T constant. NaN in a real row makes that sample's distance NaN, no other.

    Source: ViLT (Kim et al. 2021) sec. 3.2, the original ``optimal_transport_dist``.
    """
    _validate(text, image, text_pad, image_pad, beta, iterations, inner)
    name = _OP.resolve(backend, _facts(text, image, _check.needs_grad(text, image)))
    arguments = dict(
        text=text, image=image, text_pad=text_pad, image_pad=image_pad, beta=beta, iterations=iterations, inner=inner,
        return_plan=return_plan,
    )  # fmt: skip
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments)
    distance, plan = _OP(name, **arguments)
    return (distance, plan) if return_plan else distance
