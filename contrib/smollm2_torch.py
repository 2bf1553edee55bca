"""SmolLM2 in torch, for a CUDA device: what smollm2.py computes, for several texts of one length at once."""

from __future__ import annotations

from typing import Callable, Container

import numpy as np
import torch

from smollm2 import SmolLM2

#: attention(layer, q, k, v) -> out, torch's: q and out (B, n, Hq, d), k and v (B, n, Hkv, d), before RoPE
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOSS_TOKENS = 2048  # whose logits are held at once


class TorchSmolLM2:
    """The model of a SmolLM2 on a device. Weights and sums are float32, without TF32."""

    def __init__(self, host: SmolLM2, device: str):
        torch.backends.cuda.matmul.allow_tf32 = False
        self.host, self.device = host, device
        put = lambda x: torch.tensor(x, device=device)
        self.embedding, self.output_norm, self.output = map(put, (host._embedding, host._output_norm, host._output))
        self.layers = [{name: put(w) for name, w in layer.items()} for layer in host._layers]

    def forward(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Final hidden states (B, n, width) of tokens (B, n)."""
        x = self.embedding[tokens]
        heads = lambda x: x.unflatten(-1, (-1, self.host.head_dim))
        for layer, w in enumerate(self.layers):
            h = self._norm(x, w["attn_norm"])
            q, k, v = (heads(h @ w[name].T) for name in ("attn_q", "attn_k", "attn_v"))
            x = x + attention(layer, q, k, v).flatten(-2) @ w["attn_output"].T
            h = self._norm(x, w["ffn_norm"])
            x = x + (torch.nn.functional.silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
        return self._norm(x, self.output_norm)

    def nll(self, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Loss in nats, (B, n), of the tokens (B, n) that follow hidden (B, n, width)."""
        loss = [
            torch.nn.functional.cross_entropy(h @ self.output.T, t, reduction="none")
            for h, t in zip(hidden.flatten(0, 1).split(LOSS_TOKENS), following.flatten().split(LOSS_TOKENS))
        ]
        return torch.cat(loss).view(following.shape)

    def turn(self, first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (n, 1, d / 2) of RoPE's angles at positions first and after, for `rotate`."""
        m, d = self.host, self.host.head_dim
        theta = m.rope_theta * m.rope_scale ** (d / (d - 2))
        angles = np.multiply.outer(np.arange(first, first + n, dtype=np.float64), theta ** (-np.arange(0, d, 2) / d))
        cos, sin = (torch.from_numpy(f(angles).astype(np.float32)).to(self.device)[:, None] for f in (np.cos, np.sin))
        return cos, sin

    @torch.inference_mode()
    def observe(
        self,
        tokens: np.ndarray,
        layers: Container[int],
        see: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None],
        each_layer: Callable[[], object],
    ) -> np.ndarray:
        """As SmolLM2.observe."""
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
        turn = self.turn(0, len(tokens))

        def attention(layer, q, k, v):
            if layer in layers:
                see(layer, *(x[0].transpose(0, 1).cpu().numpy() for x in (q, k, v)))
            each_layer()
            q, k, v = (x[0].transpose(0, 1) for x in (rotate(q, turn), rotate(k, turn), v))
            return causal_attention_torch(q, k, v).transpose(0, 1)[None]

        hidden = self.forward(ids[None], attention)
        return self.nll(hidden[:, :-1], ids[None, 1:])[0].cpu().numpy()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(self.host.norm_epsilon)) * weight


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Interleaved RoPE of x (B, n, heads, d): components 2i and 2i + 1 turn together, by `TorchSmolLM2.turn`."""
    cos, sin = turn
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def causal_attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_block: int = 1024
) -> torch.Tensor:
    """smollm2.causal_attention in torch. Scores of one block of queries are held at a time."""
    num_heads, n, d = q.shape
    num_kv_heads, m, _ = k.shape
    group = num_heads // num_kv_heads
    q = (q * d**-0.5).reshape(num_kv_heads, group, n, d)
    out = torch.empty(q.shape, device=q.device)
    for begin in range(0, n, query_block):
        end = min(begin + query_block, n)
        seen = end + m - n
        scores = q[:, :, begin:end].reshape(num_kv_heads, -1, d) @ k[:, :seen].transpose(1, 2)
        # all but the block's own keys come before every one of its queries
        later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
        scores.view(num_kv_heads, group, end - begin, seen)[..., seen - (end - begin) :].masked_fill_(later, -torch.inf)
        out[:, :, begin:end] = (scores.softmax(-1) @ v[:, :seen]).view(num_kv_heads, group, end - begin, d)
    return out.view(num_heads, n, d)
