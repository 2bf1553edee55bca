"""A Llama-family model of Hugging Face transformers with what a trace records laid open.

It has the attributes and methods of smollm2.SmolLM2 that export_trace.py uses. Needs the Python package with its
optional part: `pip install '.[transformers]'` in the checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import faiss_saap as fs
from faiss_saap.huggingface import head_dim_of, rope_of

TOKENS_PER_BLOCK = 1024


class HuggingFaceModel:
    """RoPE is in the layout half: components i and i + d/2 turn together."""

    def __init__(self, name: str, rope_scale: float = 1.0, device: str = "auto"):
        """name: on the hub, a folder, or a .gguf file. rope_scale: as SmolLM2's. device: auto: cuda if it works."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no torch with a CUDA device here")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        path = Path(name)
        source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        place = str(path.parent) if source else name
        self.config = AutoConfig.from_pretrained(place, **source)
        try:
            rope = rope_of(self.config)
        except fs.Error as error:
            raise ValueError(str(error)) from error
        self.rope_theta, self.rope_layout, self.rope_scaling = rope.theta, rope.layout, rope.scaling
        if rope_scale != 1:
            if rope.scaling:
                raise ValueError(f"--rope-scale: the model scales its RoPE already ({rope.scaling})")
            self.rope_scaling = f"ntk:{rope_scale:.17g}"
            self.config.rope_parameters["rope_theta"] = rope.theta * rope_scale ** (rope.d / (rope.d - 2))

        self.name = path.name
        self.num_layers = self.config.num_hidden_layers
        self.num_heads = self.config.num_attention_heads
        self.num_kv_heads = self.config.num_key_value_heads
        self.head_dim = head_dim_of(self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(place, **source)
        self.model = AutoModelForCausalLM.from_pretrained(place, config=self.config, dtype="auto", **source)
        self.model.eval().to(self.device)

    def encode(self, text: str) -> np.ndarray:
        """Tokens (n,) int32 of the text, without those in `prefix`."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    @property
    def prefix(self) -> np.ndarray:
        """Tokens that the model expects before every text, (n,) int32: that of its beginning, or none."""
        return np.array(self.tokenizer("")["input_ids"], np.int32)

    @torch.inference_mode()
    def observe(
        self,
        tokens: np.ndarray,
        layers: Sequence[int],
        see: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None],
        each_layer: Callable[[], object],
    ) -> np.ndarray:
        """One dense pass over tokens (n,); returns the loss of each but the first, (n - 1,) float32.

        see(layer, q, k, v) is called for each of `layers` with q (Hq, n, d), k and v (Hkv, n, d) float32, before RoPE.
        """
        decoder = self.model.get_decoder()
        hooks = [layer.register_forward_hook(lambda *of_call: each_layer()) for layer in decoder.layers]
        for index in layers:
            hooks += self._hooks_of(index, decoder.layers[index].self_attn, see)
        try:
            ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self.device)
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
            head = self.model.get_output_embeddings()
            # scores of a block of tokens at a time: those of a long text would take gigabytes
            loss = [
                torch.nn.functional.cross_entropy(head(block).float(), of_next, reduction="none")
                for block, of_next in zip(hidden[:-1].split(TOKENS_PER_BLOCK), ids[0, 1:].split(TOKENS_PER_BLOCK))
            ]
            return torch.cat(loss).cpu().numpy()
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks_of(self, index: int, attention: torch.nn.Module, see: Callable) -> list:
        """Keep what the projections make of a layer, after their norms where there are any: what RoPE is given."""
        kept: dict[str, np.ndarray] = {}

        def keep(name: str) -> Callable:
            def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                # (1, n, heads * d), or (1, n, heads, d) after a norm
                rows = output[0].float().cpu().numpy()
                kept[name] = rows.reshape(len(rows), -1, self.head_dim).swapaxes(0, 1)

            return hook

        hooks = []
        for name in ("q", "k", "v"):
            source = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj", None)
            if source is None:
                raise ValueError(f"layer {index} of {self.name} has no {name}_proj: it is not of the Llama family")
            hooks.append(source.register_forward_hook(keep(name)))
        hooks.append(attention.register_forward_hook(lambda *of_call: see(index, kept["q"], kept["k"], kept["v"])))
        return hooks
