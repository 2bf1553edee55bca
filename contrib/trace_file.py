"""Traces: the queries, keys and values of a model on a text, before RoPE, in one safetensors file per text.

Tensors `layer.{l}.q` (Hq, tokens, d), `layer.{l}.k` and `layer.{l}.v` (Hkv, tokens, d) in fp16, bf16 or fp32,
`tokens` int32, optional `nll` fp32 (tokens - 1). Metadata, all strings: model, text, layers, kv_heads (absent: all
of the model's), rope_theta, rope_scaling (absent: none), rope_layout (half | interleaved), rope_applied (no).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

_DTYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32}


@dataclass
class Trace:
    model: str
    text: str  #: name of the text file, without its folder
    tokens: np.ndarray  #: (tokens,) int32
    rope_theta: float
    rope_layout: str = "interleaved"
    rope_scaling: str = ""  #: such as "ntk:4"; empty: none
    kv_heads: Optional[list[int]] = None  #: which heads of the model k and v hold, in order; None: all
    nll: Optional[np.ndarray] = None  #: (tokens - 1,) float32, entry i is the loss of tokens[i + 1]
    q: dict[int, np.ndarray] = field(default_factory=dict)  #: by layer, (Hq, tokens, d)
    k: dict[int, np.ndarray] = field(default_factory=dict)  #: by layer, (Hkv, tokens, d)
    v: dict[int, np.ndarray] = field(default_factory=dict)  #: by layer, (Hkv, tokens, d)

    def check(self) -> None:
        """Raises ValueError, with a sentence, unless all parts fit each other."""
        n = len(self.tokens)
        if self.tokens.dtype != np.int32 or self.tokens.ndim != 1:
            raise ValueError("The tokens of a trace must be a vector of int32.")
        if self.nll is not None and (self.nll.dtype != np.float32 or self.nll.shape != (n - 1,)):
            raise ValueError(f"A trace of {n} tokens must have {n - 1} losses (nll) in fp32.")
        if self.rope_layout not in ("half", "interleaved"):
            raise ValueError(f"The RoPE layout must be half or interleaved, not '{self.rope_layout}'.")
        if not self.q or not self.q.keys() == self.k.keys() == self.v.keys():
            raise ValueError("A trace must hold q, k and v of the same layers, and of one at least.")
        for layer in self.q:
            q, k, v = self.q[layer], self.k[layer], self.v[layer]
            if not q.ndim == k.ndim == v.ndim == 3 or q.shape[1:] != (n, q.shape[2]):
                raise ValueError(f"Layer {layer}: q, k and v must have the shape (heads, {n}, head_dim).")
            if k.shape != v.shape or k.shape[1:] != q.shape[1:] or len(k) == 0 or len(q) == 0 or len(q) % len(k):
                raise ValueError(
                    f"Layer {layer}: the shapes of q {q.shape}, k {k.shape} and v {v.shape} do not fit each other."
                )
            if self.kv_heads is not None and len(self.kv_heads) != len(k):
                raise ValueError(f"Layer {layer} holds {len(k)} KV heads, but kv_heads names {len(self.kv_heads)}.")
            for name, x in (("q", q), ("k", k), ("v", v)):
                if x.dtype not in (np.float16, np.float32):
                    raise ValueError(f"Layer {layer}: {name} must be fp16 or fp32, not {x.dtype}.")
                if not np.isfinite(x).all():
                    raise ValueError(f"Layer {layer}: {name} holds values that are infinite or not a number.")


def write_trace(path: Union[str, Path], trace: Trace) -> None:
    """Writes the file whole or not at all."""
    trace.check()
    path = Path(path)
    tensors = {"tokens": trace.tokens}
    if trace.nll is not None:
        tensors["nll"] = trace.nll
    for name, by_layer in (("q", trace.q), ("k", trace.k), ("v", trace.v)):
        for layer, x in by_layer.items():
            # safetensors writes the buffer as it lies in memory, whatever its strides
            tensors[f"layer.{layer}.{name}"] = np.ascontiguousarray(x)
    metadata = {
        "model": trace.model,
        "text": trace.text,
        "layers": ",".join(map(str, sorted(trace.q))),
        "rope_theta": f"{trace.rope_theta:.17g}",
        "rope_layout": trace.rope_layout,
        "rope_applied": "no",
    }
    if trace.rope_scaling:
        metadata["rope_scaling"] = trace.rope_scaling
    if trace.kv_heads is not None:
        metadata["kv_heads"] = ",".join(map(str, trace.kv_heads))

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # save_file would make the file readable by its owner only
        temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_trace(path: Union[str, Path]) -> Trace:
    """Reads a whole trace; bf16 becomes float32, which holds it exactly."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, not a trace.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        entries = deserialize(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    for key in ("model", "text", "rope_theta", "rope_layout", "rope_applied"):
        if key not in metadata:
            raise ValueError(f"{path} is not a trace: its metadata lacks '{key}'.")
    if metadata["rope_applied"] != "no":
        raise ValueError(f"{path} holds queries and keys after RoPE; a trace holds them before.")

    tensors = {name: _array(name, **entry) for name, entry in entries}
    if "tokens" not in tensors:
        raise ValueError(f"{path} is not a trace: it has no tensor 'tokens'.")
    kv_heads = metadata.get("kv_heads")
    trace = Trace(
        model=metadata["model"],
        text=metadata["text"],
        tokens=tensors.pop("tokens"),
        nll=tensors.pop("nll", None),
        rope_theta=float(metadata["rope_theta"]),
        rope_layout=metadata["rope_layout"],
        rope_scaling=metadata.get("rope_scaling", ""),
        kv_heads=[int(head) for head in kv_heads.split(",")] if kv_heads else None,
    )
    for name, x in tensors.items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "layer" or not parts[1].isdigit() or parts[2] not in ("q", "k", "v"):
            raise ValueError(f"{path} is not a trace: it has an unknown tensor '{name}'.")
        getattr(trace, parts[2])[int(parts[1])] = x
    trace.check()
    return trace


def _array(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":
        # bf16 is the upper half of a float32, and numpy has no type for it
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise ValueError(f"The tensor '{name}' has the type {dtype}, which no trace uses.")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
