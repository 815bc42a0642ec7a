"""Launchers of the native CPU library `vilt_fast._C`: linear_gelu, attention, encoder, patch_embed, quantize_linear.

`_C` takes addresses, sizes and strides. What it is handed is checked here, because it trusts offsets and row numbers:
everything is on the CPU, so looking costs microseconds. Inference only.
"""

import torch

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "q8"}
_BLOB_ALIGNMENT = 64


@torch.compiler.assume_constant_result
def _missing():
    try:
        from vilt_fast import _C  # noqa: F401
    except ImportError as error:
        return f"the native library vilt_fast._C is not built; pip install . with a C++ compiler ({error})."
    return ""


def _dtype_problem(**dtypes):
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
            return f"{name} is {dtype}, expected float32 or bfloat16."
    return ""


def supports(op, device="cpu", requires_grad=False, dropout=False, dtype=None, **facts):
    """ "" when the native library can run this, else why not."""
    if missing := _missing():
        return missing
    if device != "cpu":
        return f"tensors are on {device}, it runs on the CPU."
    if requires_grad:
        return "it has no backward and an input requires a gradient; use torch.no_grad() or another backend."
    if dropout:
        return "it has no dropout."
    problem = _LIMITS[op](dtype=dtype, **facts) if op in _LIMITS else _dtype_problem(dtype=dtype)
    return problem


def _attention_limits(dtype=None, head_dim=64, causal=False, generator=False, **facts):
    if causal:
        return "it has no causal attention."
    if head_dim > 256:
        return f"head dim is {head_dim}, at most 256."
    return _dtype_problem(dtype=dtype)


def _encoder_limits(dtype=None, compute="float32", weights="float", weight_dtypes=(), **facts):
    if dtype not in (None, torch.float32):
        return f"x is {dtype}, expected float32."
    if compute == "int8" and weights == "float" and weight_dtypes:
        return "compute='int8' takes the six weights of each layer as blobs: functional.quantize_linear(weight)."
    for weight_dtype in weight_dtypes:
        if problem := _dtype_problem(parameters=weight_dtype):
            return problem
    return ""


def _patch_embed_limits(
    dtype=None, pixel_dtype=None, text_dtype=None, out_dtype=None, table_dtypes=(), square=True, **facts
):
    if not square:
        return "patches are not square."
    for table_dtype in table_dtypes:
        if problem := _dtype_problem(tables=table_dtype):
            return problem
    return _dtype_problem(weight=dtype, pixels=pixel_dtype, text=text_dtype, out=out_dtype)


_LIMITS = {"attention": _attention_limits, "encoder": _encoder_limits, "patch_embed": _patch_embed_limits}


def _address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def as_float32(tensor):
    """Dense float32 values without a gradient; None stays."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _dense_rows(tensor):
    """The same [rows, H, d] or [rows, K] values with everything but the rows dense; no copy for a column slice."""
    inner = tensor.shape[-1]
    dense = tensor.stride(-1) == 1 and (tensor.dim() == 2 or tensor.stride(-2) == inner)
    width = inner if tensor.dim() == 2 else inner * tensor.shape[-2]
    return tensor if dense and tensor.stride(0) >= width else tensor.contiguous()


def linear_gelu_fwd(x, weight, bias):
    from vilt_fast import _C

    rows = _dense_rows(x.reshape(-1, x.shape[-1]))
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    name = _NAMES[x.dtype]
    if out.numel():
        _C.linear(
            rows.data_ptr(), name, weight.data_ptr(), name, _address(bias), name, out.data_ptr(), name,
            rows.shape[0], *weight.shape, rows.stride(0), weight.shape[0], True, name, torch.get_num_threads(),
        )  # fmt: skip
    return out


def _check_offsets(name, cu_seqlens, rows):
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != rows or any(a > b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"{name} is {values}, expected to start at 0, not to decrease and to end at {rows} rows.")
    return cu_seqlens.contiguous()


def _on_cpu(**tensors):
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the cpp backend reads it on the CPU.")


def attention_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
    seqused_k=None, causal_start=None, dropout_p=0.0, scale=None, return_lse=False, generator=None,
):  # fmt: skip
    from vilt_fast import _C

    _on_cpu(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
    cu_seqlens_q = _check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    cu_seqlens_k = _check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    seqused_k = None if seqused_k is None else seqused_k.contiguous()
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    rows, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.float32) if return_lse else None
    if out.numel():
        _C.attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _NAMES[q.dtype], heads, width,
            len(cu_seqlens_q) - 1, q.stride(0), k.stride(0), v.stride(0), out.stride(0), cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), _address(seqused_k), width**-0.5 if scale is None else scale, _address(lse),
            torch.get_num_threads(),
        )  # fmt: skip
    return (out, lse) if return_lse else out


def quantize_linear(weight):
    """Native blob of weight [N, K], then N and K as int64: uint8, one dimension."""
    from vilt_fast import _C

    weight = weight.detach().contiguous()
    size = -(-_C.quantized_bytes(*weight.shape) // 16) * 16
    blob = torch.zeros(size + 16, dtype=torch.uint8)
    blob[size:].view(torch.int64).copy_(torch.tensor(weight.shape))
    _C.quantize_linear(weight.data_ptr(), _NAMES[weight.dtype], *weight.shape, blob.data_ptr(), torch.get_num_threads())
    return blob


def _blob(place, blob):
    """The blob as the library wants it, aligned, and the (N, K) it was made from."""
    from vilt_fast import _C

    rows, columns = blob[-16:].contiguous().view(torch.int64).tolist() if blob.numel() > 16 else (0, 0)
    if min(rows, columns) < 1 or -(-_C.quantized_bytes(rows, columns) // 16) * 16 + 16 != blob.numel():
        raise ValueError(f"encoder: parameter {place} is uint8 but no blob of quantize_linear; make one.")
    blob = blob.contiguous()
    return (blob.clone() if blob.data_ptr() % _BLOB_ALIGNMENT else blob), (rows, columns)


def encoder_fwd(
    x, parameters, cu_seqlens, seqused_k, max_seqlen, *, num_heads, eps, compute="float32", return_hidden=False
):
    from vilt_fast import _C

    _on_cpu(cu_seqlens=cu_seqlens, seqused_k=seqused_k)
    rows, width = x.shape
    layers = len(parameters) // 16
    cu_seqlens, seqused_k = _check_offsets("cu_seqlens", cu_seqlens, rows), seqused_k.contiguous()
    held, inner = [], None
    for place, parameter in enumerate(parameters):
        slot = place % 16
        if parameter.dtype == torch.uint8:
            parameter, shape = _blob(place, parameter)
        else:
            parameter, shape = parameter.contiguous(), tuple(parameter.shape)
        if slot == 12:
            inner = shape[0] if inner is None else inner
        want = {2: width, 4: width, 6: width, 8: width, 12: inner, 14: width}.get(slot)
        if want is not None and shape != (want, inner if slot == 14 else width):
            raise ValueError(
                f"encoder: parameter {place} is a weight {list(shape)}, expected "
                f"{[want, inner if slot == 14 else width]}; the native encoder takes layers of one size."
            )
        if slot == 13 and shape not in ((inner,), (0,)):
            raise ValueError(f"encoder: parameter {place} has shape {list(shape)}, expected [{inner}] or [0] (none).")
        held.append(parameter)  # keeps contiguous copies alive during the call
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    hidden = x.new_empty(layers, rows, width) if return_hidden else None
    if rows:
        x = x.contiguous()
        _C.encoder(
            x.data_ptr(), out.data_ptr(), _address(hidden), rows, width, layers, [_address(p) for p in held],
            [_NAMES[p.dtype] if p.numel() else "f32" for p in held], inner, num_heads, eps, cu_seqlens.data_ptr(),
            seqused_k.data_ptr(), len(seqused_k), {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}[compute],
            torch.get_num_threads(),
        )  # fmt: skip
    return hidden if return_hidden else out


def _check_indices(limits, **indices):
    for name, tensor in indices.items():
        if tensor.numel():
            low, high = (bound.item() for bound in tensor.aminmax())
            if low < 0 or high >= limits[name]:
                raise IndexError(
                    f"patch_embed: {name} holds {low if low < 0 else high}, expected 0 <= index < {limits[name]}."
                )


def patch_embed_fwd(
    pixels, weight, bias, cls_token, position, modality, text,
    text_rows, patch_source, patch_rows, patch_sample, pos_index, pos_weight, cls_rows, modality_index, total_rows, *,
    dropout_p=0.0, out_dtype=None,
):  # fmt: skip
    from vilt_fast import _C

    width, channels, size, _ = weight.shape
    images, _, height, columns = pixels.shape
    gh, gw = height // size, columns // size
    limits = dict(
        text_rows=total_rows, patch_rows=total_rows, cls_rows=total_rows, patch_source=images * gh * gw,
        patch_sample=images, pos_index=position.shape[0], modality_index=modality.shape[0],
    )  # fmt: skip
    indices = dict(
        text_rows=text_rows, patch_rows=patch_rows, cls_rows=cls_rows, patch_source=patch_source,
        patch_sample=patch_sample, pos_index=pos_index, modality_index=modality_index,
    )  # fmt: skip
    _check_indices(limits, **indices)
    plain = torch.Tensor.contiguous
    patch_source, patch_rows, patch_sample = map(plain, (patch_source, patch_rows, patch_sample))
    pos_index, cls_rows, modality_index = map(plain, (pos_index, cls_rows, modality_index))
    weight, position, modality, cls_token = map(plain, (weight, position, modality, cls_token))
    bias = None if bias is None else bias.contiguous()
    pos_weight = pos_weight.to(torch.float32).contiguous()
    listed = len(text_rows) + len(patch_rows) + len(cls_rows)
    make = torch.empty if listed == total_rows else torch.zeros
    out = make(total_rows, width, dtype=torch.float32)
    out.index_copy_(0, text_rows, text.to(torch.float32))
    _C.patch_embed(
        pixels.data_ptr(), _NAMES[pixels.dtype], list(pixels.stride()), size, channels,
        weight.data_ptr(), _NAMES[weight.dtype], _address(bias), _NAMES[weight.dtype], width,
        _address(patch_source), gh, gw, _address(patch_rows), _address(pos_index), _address(pos_weight),
        position.data_ptr(), _NAMES[position.dtype], cls_token.data_ptr(), _NAMES[cls_token.dtype], cls_rows.data_ptr(),
        modality.data_ptr(), _NAMES[modality.dtype], modality_index.data_ptr(), _address(patch_sample), out.data_ptr(),
        len(patch_rows), images, _NAMES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out.to(weight.dtype if out_dtype is None else out_dtype)
