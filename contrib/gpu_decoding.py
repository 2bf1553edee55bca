"""What sparse_decoding.py does, on a CUDA device: torch computes the model, GpuAttentionAdapter attends, several texts
of one length go side by side.

Every method sees the same rounding: keys, values and queries are float16, sums float32. Weights are float32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Container, Iterable, Optional, Sequence

import numpy as np
import torch

import faiss_saap as fs
from smollm2 import SmolLM2
from smollm2_torch import TorchSmolLM2, rotate
from sparse_decoding import METHODS_OF_CELLS, SINK, WINDOW, bytes_of_codes, offline_partitions

#: replaced in tests without a device, by what attends in main memory
DEVICE = "cuda"
GpuAttentionAdapter = getattr(fs, "GpuAttentionAdapter", None)
sequence_partitions = getattr(fs, "gpu_sequence_partitions", None)


class GpuCache:
    """Rotated keys and values of B texts of one length, float16: k and v (layers, B, heads_kv, capacity, d)."""

    def __init__(self, model: SmolLM2, texts: int, capacity: int, device: str):
        shape = (model.num_layers, texts, model.num_kv_heads, capacity, model.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2))
        self.texts, self.capacity = texts, capacity
        self.length = 0  #: tokens that are filled in all layers

    def write(self, layer: int, text: slice, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v (B, n, heads_kv, d) of the slots first and after."""
        n = k.shape[1]
        self.k[layer, text, :, first : first + n] = k.transpose(1, 2)
        self.v[layer, text, :, first : first + n] = v.transpose(1, 2)

    def view(self, layer: int, text: int) -> fs.KvView:
        return fs.KvView.head_major(self.k[layer, text], self.v[layer, text])

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token in all layers."""
        return 2 * self.k[:, 0, :, 0].numel() * self.k.element_size()


class GpuMethod:
    """As sparse_decoding.Method, for all tokens of a layer at once."""

    def __init__(self, name: str, cache: GpuCache):
        self.name, self.cache = name, cache

    def begin(self, budget: float) -> None:
        self.budget = budget
        #: far keys read, and far keys there were, of each text: sums over tokens, layers and KV heads
        self.counted = torch.zeros(self.cache.texts, 2, dtype=torch.int64, device=self.cache.k.device)

    def attend(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        """Output (n, B, heads_q, d), float32, for queries q likewise of the tokens at first and after, rotated."""
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """Of all texts together."""
        read, far = self.counted.sum(0).tolist()
        return read, far

    @property
    def selectivity(self) -> np.ndarray:
        """Of each text, (B,)."""
        read, far = self.counted.cpu().numpy().T
        return read / np.maximum(far, 1)

    def index_bytes(self) -> int:
        return 0


class Chosen(GpuMethod):
    """Attention over the far keys that `far_mask` chooses, dense beside them, in plain products."""

    ROWS = 128  # tokens at a time: their scores are held

    def attend(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        for begin in range(0, len(q), self.ROWS):
            rows = slice(begin, min(begin + self.ROWS, len(q)))
            out[rows] = self._attend(layer, first + begin, q[rows])
        return out

    def _attend(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        n, texts, heads_q, d = q.shape
        end = first + n
        k, v = (x[layer, :, :, :end].float() for x in (self.cache.k, self.cache.v))
        group = heads_q // k.shape[1]
        # (B, heads_kv, group, n, d)
        rows = q.float().unflatten(2, (-1, group)).permute(1, 2, 3, 0, 4) * d**-0.5
        scores = (rows.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, (group, n))
        at = torch.arange(first, end, device=q.device)[:, None]
        slot = torch.arange(end, device=q.device)
        scores.masked_fill_(slot > at, -torch.inf)
        far = (slot >= SINK) & (slot <= at - WINDOW)
        chosen = self.far_mask(scores, far)
        self.counted[:, 0] += chosen.expand(texts, k.shape[1], n, end).sum((1, 2, 3))
        self.counted[:, 1] += k.shape[1] * far.sum()
        scores.masked_fill_((far & ~chosen)[:, :, None], -torch.inf)
        out = scores.softmax(-1).flatten(2, 3) @ v
        return out.unflatten(2, (group, n)).permute(3, 0, 1, 2, 4).flatten(2, 3)

    def far_mask(self, scores: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """Which of the far keys (n, slots) are read: (B or 1, heads_kv or 1, n, slots), from the causal scores (B,
        heads_kv, group, n, slots)."""
        raise NotImplementedError


class Dense(Chosen):
    def far_mask(self, scores: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        return far[None, None]


class WindowOnly(Chosen):
    def far_mask(self, scores: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(far)[None, None]


class OracleTopK(Chosen):
    ROWS = 32

    def far_mask(self, scores: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        mass = scores.softmax(-1).sum(2).masked_fill_(~far, -1)
        count = (self.budget * far.sum(1)).long()
        best = mass.topk(max(1, int(count.max())), dim=-1).indices
        rank = torch.arange(best.shape[-1], device=best.device)
        within = (rank < count[:, None]).expand(best.shape)
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, within)


class GpuCells(GpuMethod):
    """GpuAttentionAdapter, one for each layer: with partitions[layer][kv_head] of all texts (each a list; may be
    empty), and own[layer][text][kv_head] of each."""

    def __init__(
        self,
        name: str,
        cache: GpuCache,
        model: SmolLM2,
        partitions: Sequence[Sequence[list[fs.Partition]]],
        own: Sequence[Sequence[Sequence[list[fs.Partition]]]],
        split: Sequence[float],
    ):
        super().__init__(name, cache)
        self.group = model.num_heads // model.num_kv_heads
        self.prefilled, self.split = cache.length, list(split)
        self.adapters, self.batches, self.sequences, self.views = [], [], [], []
        heads = [h for layer in partitions for h in layer] + [h for layer in own for text in layer for h in text]
        self.most_cells = max(p.ncell for head in heads for p in head)
        bytes_of = lambda heads: sum(p.query.bytes_read() for head in heads for p in head)
        of_text = lambda layer: bytes_of(layer[0]) if layer else 0
        self._index_bytes = sum(map(bytes_of, partitions)) + sum(map(of_text, own))
        for layer in range(model.num_layers):
            adapter = GpuAttentionAdapter(
                model.num_heads, model.num_kv_heads, model.head_dim, partitions[layer] if partitions else None,
                sink=SINK, window=WINDOW,
            )  # fmt: skip
            views = [cache.view(layer, text) for text in range(cache.texts)]
            numbers = [adapter.create(own[layer][t] if own else None, cache.capacity) for t in range(cache.texts)]
            inputs = lambda tokens: [fs.SequenceInput(s, v, tokens) for s, v in zip(numbers, views)]
            adapter.append(adapter.plan(inputs(cache.length)))
            self.adapters.append(adapter)
            self.batches.append(adapter.plan(inputs(1)))
            self.sequences.append(numbers)
            self.views.append(views)

    def begin(self, budget: float) -> None:
        super().begin(budget)
        for adapter, numbers, views in zip(self.adapters, self.sequences, self.views):
            for sequence, view in zip(numbers, views):
                adapter.truncate(sequence, self.prefilled, view)
        self._policy = fs.ProbePolicy(nprobe=self.most_cells, max_selectivity=budget, split=self.split)

    def attend(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        stats = torch.empty(*q.shape[:3], 4, dtype=torch.int64, device=q.device)
        adapter, batch = self.adapters[layer], self.batches[layer]
        for t in range(len(q)):
            adapter.step(batch, q[t], out[t], None, stats[t], self._policy)
        adapter.check()
        # the query heads of a KV head share their choice
        self.counted += stats[:, :, :: self.group, 1:3].sum((0, 2))
        return out

    def index_bytes(self) -> int:
        return self._index_bytes


class HostCells(GpuMethod):
    """AttentionAdapter over a copy of the cache in main memory, for what GpuAttentionAdapter does not do: with the
    partitions of GpuCells, keys ranked by their codes."""

    def __init__(
        self,
        name: str,
        cache: GpuCache,
        model: SmolLM2,
        partitions: Sequence[Sequence[list[fs.Partition]]],
        own: Sequence[Sequence[Sequence[list[fs.Partition]]]],
        split: Sequence[float],
        refine: float,
    ):
        super().__init__(name, cache)
        self.split, self.refine = list(split), refine
        self.group = model.num_heads // model.num_kv_heads
        self.k, self.v = cache.k.cpu().numpy(), cache.v.cpu().numpy()
        self.sequences = []

        def prefilled(layer: int) -> tuple[fs.AttentionAdapter, list[int]]:
            adapter = fs.AttentionAdapter(
                model.num_heads, model.num_kv_heads, model.head_dim, partitions[layer] if partitions else None,
                sink=SINK, window=WINDOW, key_codes=True,
            )  # fmt: skip
            numbers = [adapter.create(own[layer][text] if own else None) for text in range(cache.texts)]
            for text, sequence in enumerate(numbers):
                adapter.append(sequence, self.view(layer, text, cache.length))
            return adapter, numbers

        with ThreadPoolExecutor() as pool:  # an append has a thread for each KV head, and there are few
            self.adapters, self.prefilled = zip(*pool.map(prefilled, range(model.num_layers)))
        first = [adapter.partition(s[0], h, i) for adapter, s in zip(self.adapters, self.prefilled)
                 for h in range(model.num_kv_heads) for i in range(adapter.npartition(s[0], h))]  # fmt: skip
        self.most_cells = max(p.ncell for p in first)
        self.bytes_of_cells = sum(p.query.bytes_read() for p in first)

    def view(self, layer: int, text: int, length: int) -> fs.KvView:
        return fs.KvView.head_major(self.k[layer, text], self.v[layer, text], length)

    def begin(self, budget: float) -> None:
        super().begin(budget)
        for adapter, numbers in zip(self.adapters, self.sequences):
            for sequence in numbers:
                adapter.free(sequence)
        self.sequences = [[a.fork(s) for s in numbers] for a, numbers in zip(self.adapters, self.prefilled)]
        self.policy = fs.ProbePolicy(
            nprobe=self.most_cells, max_selectivity=budget, split=self.split, refine=self.refine
        )
        self.ranked = self.asked = 0

    def attend(self, layer: int, first: int, q: torch.Tensor) -> torch.Tensor:
        end = first + len(q)
        for host, device in ((self.k, self.cache.k), (self.v, self.cache.v)):
            host[layer, :, :, first:end] = device[layer, :, :, first:end].cpu().numpy()
        adapter, numbers = self.adapters[layer], self.sequences[layer]
        views = [self.view(layer, text, first) for text in range(self.cache.texts)]
        batch = [fs.SequenceInput(s, view) for s, view in zip(numbers, views)]
        queries = q.float().cpu().numpy()
        out = np.empty(queries.shape, np.float32)
        counted = np.zeros((self.cache.texts, 2), np.int64)
        for t in range(len(queries)):
            for sequence, view in zip(numbers, views):
                view.length = first + t + 1
                adapter.append(sequence, view)
            result = adapter.attend(batch, queries[t], self.policy)
            out[t] = result.output
            # the query heads of a KV head share their choice
            of_head = lambda x: x[:, :: self.group].sum(1)
            counted += np.stack([of_head(result.keys_read), of_head(result.far_keys)], 1)
            self.ranked += int(of_head(result.keys_ranked).sum())
            self.asked += self.cache.texts
        self.counted += torch.from_numpy(counted).to(q.device)
        return torch.from_numpy(out).to(q.device)

    def index_bytes(self) -> int:
        return self.bytes_of_cells + bytes_of_codes(self.ranked, self.asked, self.adapters)


class GpuDecoding:
    """As sparse_decoding.CpuDecoding, for as many texts at once as the device has room for."""

    def __init__(self, model: SmolLM2, texts_at_once: int):
        self.model, self.texts_at_once = model, texts_at_once
        self.gpu = TorchSmolLM2(model, DEVICE)

    def prefill(
        self,
        tokens: np.ndarray,
        capacity: int,
        like: Optional[np.ndarray] = None,
        each_layer: Optional[Callable[[], object]] = None,
    ) -> GpuCache:
        cache = GpuCache(self.model, len(tokens), capacity, DEVICE)
        turn = self.gpu.turn(0, tokens.shape[1])
        for b, text in enumerate(tokens):

            def attention(layer, q, k, v):
                q, k = rotate(q, turn), rotate(k, turn)
                cache.write(layer, slice(b, b + 1), 0, k, v)
                if each_layer:
                    each_layer()
                q, k, v = (x.transpose(1, 2).half() for x in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return out.transpose(1, 2).float()

            with torch.inference_mode():
                self.gpu.forward(self._put(text[None]), attention)
        cache.length = tokens.shape[1]
        return cache

    def methods(
        self,
        names: Iterable[str],
        cache: GpuCache,
        trained: Optional[fs.PartitionSet],
        keys_per_cell: int,
        trained_share: float,
        refine: float = 6,
    ) -> Iterable[GpuMethod]:
        learnt: list = []

        def own() -> list:
            """k-means of each prefill's rotated keys."""
            if not learnt:
                n = cache.length
                ncell = max(1, (n - SINK) // keys_per_cell)
                for layer in range(self.model.num_layers):
                    views = [cache.view(layer, text) for text in range(cache.texts)]
                    learnt.append([sequence_partitions(view, SINK, n, ncell) for view in views])
            return learnt

        for name in names:
            if name in METHODS_OF_CELLS:
                kind = METHODS_OF_CELLS[name]
                split = [trained_share, 1 - trained_share] if kind.trained and kind.own else []
                partitions = offline_partitions(self.model, trained, kind.blend) if kind.trained else []
                cells = partitions, own() if kind.own else [], split
                if kind.codes:
                    yield HostCells(name, cache, self.model, *cells, refine)
                else:
                    yield GpuCells(name, cache, self.model, *cells)
            else:
                yield {"dense": Dense, "window": WindowOnly, "oracle_topk": OracleTopK}[name](name, cache)

    def decode(
        self,
        method: GpuMethod,
        tokens: np.ndarray,
        first: int,
        layers: Optional[Container[int]] = None,
        kv_heads: Optional[Container[int]] = None,
    ) -> torch.Tensor:
        cache, model = method.cache, self.model
        group = model.num_heads // model.num_kv_heads
        others = [h for h in range(model.num_kv_heads) if kv_heads is not None and h not in kv_heads]
        dense = Dense("dense", cache)
        dense.begin(1.0)

        turn = self.gpu.turn(first, tokens.shape[1])

        def attention(layer, q, k, v):
            q, k = rotate(q, turn), rotate(k, turn)
            cache.write(layer, slice(None), first, k, v)
            queries = q.transpose(0, 1).half().contiguous()
            by_method = layers is None or layer in layers
            out = (method if by_method else dense).attend(layer, first, queries)
            if by_method and others:
                everywhere = dense.attend(layer, first, queries)
                for head in others:
                    out[:, :, head * group : (head + 1) * group] = everywhere[:, :, head * group : (head + 1) * group]
            return out.transpose(0, 1)

        with torch.inference_mode():
            return self.gpu.forward(self._put(tokens), attention)

    def nll(self, hidden: torch.Tensor, following: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.gpu.nll(hidden, self._put(following)).cpu().numpy()

    def likeliest(self, hidden: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return (hidden @ self.gpu.output.T).argmax(-1).cpu().numpy()

    def _put(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(DEVICE)
