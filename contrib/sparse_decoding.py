"""SmolLM2 decoding through the library in all its layers: a cache of keys and values, and ways to attend to it.

A way to attend (Method) answers one token of one layer. `decode` runs tokens through the model layer by layer and, in
each layer, token by token: a token's keys enter the cache, then its queries are answered. With given tokens that is
what decoding one after the other computes, and the products with the weights stay matrix products.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Callable, Container, Iterable, NamedTuple, Optional, Sequence

# Decoding alternates between the threads of numpy's BLAS and the library's. Those that wait by spinning, as is OpenMP's
# default, keep the others from the cores: ten times slower where other programs want them too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import faiss_saap as fs  # noqa: E402
import numpy as np  # noqa: E402

from smollm2 import SmolLM2, causal_attention  # noqa: E402

SINK, WINDOW = 16, 512


class KvCache:
    """Rotated keys and values of one text, float16: k and v (layers, heads_kv, capacity, d)."""

    def __init__(self, model: SmolLM2, capacity: int):
        shape = (model.num_layers, model.num_kv_heads, capacity, model.head_dim)
        self.k, self.v = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
        self.length = 0  #: tokens that are filled in all layers

    def write(self, layer: int, first: int, k: np.ndarray, v: np.ndarray) -> None:
        """k, v (heads_kv, n, d) of the slots first and after."""
        self.k[layer, :, first : first + k.shape[1]] = k
        self.v[layer, :, first : first + k.shape[1]] = v

    def view(self, layer: int, length: int) -> fs.KvView:
        return fs.KvView.head_major(self.k[layer], self.v[layer], length)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token in all layers."""
        return 2 * self.k[:, :, 0].nbytes

    def copy_of(self, other: KvCache, length: int) -> None:
        """Begins with the first tokens of another cache."""
        self.k[:, :, :length], self.v[:, :, :length] = other.k[:, :, :length], other.v[:, :, :length]
        self.length = length


def prefill(
    model: SmolLM2, tokens: np.ndarray, cache: KvCache, each_layer: Optional[Callable[[], object]] = None
) -> None:
    """Fills the cache with all of tokens (n,) by dense attention; those it holds already are not computed again."""
    first, n = cache.length, len(tokens)

    def attention(layer, q, k, v, positions):
        cache.write(layer, first, model.rotate(k, positions), v)
        held = (x[layer, :, :n].astype(np.float32) for x in (cache.k, cache.v))
        out = causal_attention(model.rotate(q, positions), *held)
        if each_layer:
            each_layer()
        return out

    if n > first:
        model.forward(tokens[first:], attention, first)
    cache.length = n


def cached_prefill(
    model: SmolLM2, tokens: np.ndarray, capacity: int, folder: Path, each_layer: Optional[Callable[[], object]] = None
) -> KvCache:
    """The cache after tokens (n,), from a file in the folder where an earlier run left it."""
    key = f"{model.name} {model.rope_scale} ".encode() + tokens.astype(np.int32).tobytes()
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.npy"
    cache = KvCache(model, capacity)
    n = len(tokens)
    if path.exists():
        cache.k[:, :, :n], cache.v[:, :, :n] = np.load(path, mmap_mode="r")
        cache.length = n
        return cache
    prefill(model, tokens, cache, each_layer)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.stack([cache.k[:, :, :n], cache.v[:, :, :n]]))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return cache


class Method:
    """How queries are answered. Its cache holds a prefill of `length` tokens; more are decoded after it."""

    def __init__(self, name: str, cache: KvCache):
        self.name, self.cache = name, cache

    def begin(self, budget: float) -> None:
        """Forgets the tokens decoded so far; from here on at most this share of the far keys is read per KV head."""
        self.budget = budget
        self.keys_read = self.far_keys = 0

    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        """Output (heads_q, d) for the newest token of the view, its queries q (heads_q, d) rotated."""
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """Far keys read since `begin`, and far keys there were: sums over tokens, layers and KV heads."""
        return self.keys_read, self.far_keys

    @property
    def selectivity(self) -> float:
        return self.keys_read / self.far_keys if self.far_keys else 0.0

    def count(self, keys_read: int, far_keys: int) -> None:
        self.keys_read += keys_read
        self.far_keys += far_keys

    def index_bytes(self) -> int:
        """What choosing reads for one token, all layers together, beside the keys and values."""
        return 0

    @staticmethod
    def far_end(view: fs.KvView) -> int:
        return max(SINK, view.length - WINDOW)


class Dense(Method):
    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        far = (self.far_end(view) - SINK) * view.heads
        self.count(far, far)
        return fs.attend_dense(view, q)[0]


class WindowOnly(Method):
    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        end = self.far_end(view)
        self.count(0, (end - SINK) * view.heads)
        sink = fs.attend_dense(view, q, 0, min(SINK, view.length))
        return fs.merge_states(*sink, *fs.attend_dense(view, q, end, view.length))[0]


class OracleTopK(Method):
    """The best far keys one by one: those with the most attention, summed over the query heads of a KV head."""

    def begin(self, budget: float) -> None:
        super().begin(budget)
        self._layer, self._keys = -1, np.empty((0, 0, 0), np.float32)

    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        end = self.far_end(view)
        if layer != self._layer or end > self._keys.shape[1]:
            self._layer, self._keys = layer, self.cache.k[layer, :, : view.length].astype(np.float32)
        out = np.empty_like(q)
        group = len(q) // view.heads
        dense = np.r_[0 : min(SINK, view.length), end : view.length]
        lse = fs.attend_dense(view, q)[1]
        for head in range(view.heads):
            own = slice(head * group, (head + 1) * group)
            scores = q[own] @ self._keys[head, SINK:end].T * np.float32(view.d**-0.5)
            best = int(self.budget * scores.shape[1])
            chosen = np.empty(0, np.int64)
            if best:
                mass = np.exp(scores - lse[own, None]).sum(0)
                chosen = SINK + np.argpartition(-mass, best - 1)[:best]
            slots = np.sort(np.concatenate([dense, chosen])).astype(np.int32)
            out[own] = fs.attend_slots(view, head, q[own], slots)[0]
            self.count(best, scores.shape[1])
        return out


def bytes_of_codes(ranked: int, asked: int, adapters: Sequence[fs.AttentionAdapter]) -> int:
    """What the codes of keys take that one token ranks in all layers, from the sum over so many tokens and layers."""
    return round(ranked / max(1, asked) * len(adapters) * fs.key_code_size(adapters[0].d))


class Cells(Method):
    """The library's adapter, one for each layer, with these partitions[layer][kv_head] (each a list)."""

    def __init__(
        self,
        name: str,
        cache: KvCache,
        model: SmolLM2,
        partitions: Sequence[Sequence[list[fs.Partition]]],
        split: Sequence[float] = (),
        refine: float = 1,
    ):
        """split: shares of the budget of a head's partitions; empty: equal ones. refine: candidates for each key that is
        read, ranked by their codes; 1: all keys of the cells are read."""
        super().__init__(name, cache)
        self.partitions, self.split, self.refine = partitions, list(split), refine
        self.adapters, self.prefilled, self.sequences = [], [], []
        for layer in range(model.num_layers):
            adapter = fs.AttentionAdapter(
                model.num_heads, model.num_kv_heads, model.head_dim, partitions[layer], sink=SINK, window=WINDOW,
                key_codes=refine > 1,
            )  # fmt: skip
            sequence = adapter.create()
            adapter.append(sequence, cache.view(layer, cache.length))
            self.adapters.append(adapter)
            self.prefilled.append(sequence)

    def begin(self, budget: float) -> None:
        super().begin(budget)
        for adapter, sequence in zip(self.adapters, self.sequences):
            adapter.free(sequence)
        self.sequences = [a.fork(s) for a, s in zip(self.adapters, self.prefilled)]
        most = max(p.ncell for layer in self.partitions for head in layer for p in head)
        self._policy = fs.ProbePolicy(nprobe=most, max_selectivity=budget, split=self.split, refine=self.refine)
        self._ranked = self._calls = 0

    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        adapter, sequence = self.adapters[layer], self.sequences[layer]
        adapter.append(sequence, view)
        result = adapter.attend([fs.SequenceInput(sequence, view)], q, self._policy)
        # the query heads of a KV head share their choice
        first_of_group = slice(None, None, adapter.heads_q // adapter.heads_kv)
        self.count(
            int(result.keys_read[0, first_of_group].sum()), int(result.far_keys[0, first_of_group].sum())
        )
        self._ranked += int(result.keys_ranked[0, first_of_group].sum())
        self._calls += 1
        return result.output[0]

    def index_bytes(self) -> int:
        cells = sum(p.query.bytes_read() for layer in self.partitions for head in layer for p in head)
        return cells + bytes_of_codes(self._ranked, self._calls, self.adapters)


class Planned(Cells):
    """Each KV head as the plan in the file of partitions says (choose_partitions): of the budget that was chosen for."""

    def __init__(self, name: str, cache: KvCache, model: SmolLM2, trained: Optional[fs.PartitionSet]):
        if trained is None:
            raise ValueError("the method planned needs --partitions")
        n = cache.length
        plans = [fs.LayerPlan(trained, layer, model.num_kv_heads) for layer in range(model.num_layers)]
        rope = rope_of(model)
        super().__init__(name, cache, model, [
            [[fs.Partition(p.key, p.query, rope) for p in head] + own
             for head, own in zip(plan.trained, plan.own(cache.view(layer, n), SINK, n))]
            for layer, plan in enumerate(plans)
        ])  # fmt: skip
        self._policies = [plan.policy for plan in plans]

    def attend(self, layer: int, view: fs.KvView, q: np.ndarray) -> np.ndarray:
        self._policy = self._policies[layer]
        return super().attend(layer, view, q)


class Kind(NamedTuple):
    """What a method's cells are, and whether their keys are ranked by codes before the best are read."""

    trained: bool = False
    blend: bool = False  #: trained ones by classifier and statistics, not by the classifier alone
    own: bool = False  #: of the text's own rotated keys
    codes: bool = False


METHODS_OF_CELLS = {
    "ivf_rope_ip": Kind(own=True),
    "saap": Kind(trained=True),
    "saap_blend": Kind(trained=True, blend=True),
    "union": Kind(trained=True, own=True),
    "union_blend": Kind(trained=True, blend=True, own=True),
    "ivf_codes": Kind(own=True, codes=True),
    "saap_codes": Kind(trained=True, codes=True),
    "union_codes": Kind(trained=True, own=True, codes=True),
}
#: in the order of tables
METHODS = ("dense", "window", "oracle_topk", *METHODS_OF_CELLS, "planned")


def rope_of(model: SmolLM2) -> fs.RopeParams:
    return fs.RopeParams(model.head_dim, model.rope_theta, "interleaved", model.rope_scaling)


def offline_partitions(
    model: SmolLM2, trained: Optional[fs.PartitionSet], blend: bool
) -> list[list[list[fs.Partition]]]:
    """Trained partitions of each layer and KV head.

    Their cells are of de-rotated keys and their classifiers see queries before RoPE, so they serve other RoPE scalings
    than that of their training too: keys are rotated back by the model's own.
    """
    if trained is None:
        raise ValueError("methods with trained cells need --partitions")
    rope = rope_of(model)
    found = [[trained.find(l, h) for h in range(model.num_kv_heads)] for l in range(model.num_layers)]
    parts = [[p.blended() if blend else p.partition for p in layer] for layer in found]
    return [[[fs.Partition(p.key, p.query, rope)] for p in layer] for layer in parts]


def make_methods(
    names: Iterable[str],
    cache: KvCache,
    model: SmolLM2,
    trained: Optional[fs.PartitionSet],
    keys_per_cell: int = 32,
    trained_share: float = 0.5,
    refine: float = 6,
) -> Iterable[Method]:
    """The methods of these names after the prefill in the cache, one after the other.

    trained: needed by those with trained cells. keys_per_cell: of the text's own cells. trained_share: of the budget,
    where both kinds of cells are probed. refine: candidates for each key that is read, where keys are ranked by codes.
    """
    learnt: list[list[list[fs.Partition]]] = []

    def own() -> list[list[list[fs.Partition]]]:
        """k-means of the prefill's rotated keys."""
        if not learnt:
            n = cache.length
            ncell = max(1, (n - SINK) // keys_per_cell)
            learnt.extend(fs.sequence_partitions(cache.view(l, n), SINK, n, ncell) for l in range(model.num_layers))
        return learnt

    for name in names:
        if name in METHODS_OF_CELLS:
            kind = METHODS_OF_CELLS[name]
            kinds = [offline_partitions(model, trained, kind.blend)] if kind.trained else []
            kinds += [own()] if kind.own else []
            both = [[sum(head, []) for head in zip(*layer)] for layer in zip(*kinds)]
            split = [trained_share, 1 - trained_share] if len(kinds) == 2 else []
            yield Cells(name, cache, model, both, split, refine if kind.codes else 1)
        elif name == "planned":
            yield Planned(name, cache, model, trained)
        elif name in METHODS:
            yield {"dense": Dense, "window": WindowOnly, "oracle_topk": OracleTopK}[name](name, cache)
        else:
            raise ValueError(f"method '{name}' must be one of {', '.join(METHODS)}")


def decode(
    model: SmolLM2,
    method: Method,
    tokens: np.ndarray,
    first: int,
    layers: Optional[Container[int]] = None,
    kv_heads: Optional[Container[int]] = None,
) -> np.ndarray:
    """Final hidden states (n, width) of tokens (n,) at position first and after.

    The method attends in these layers and KV heads (None: in all); the others are dense.
    """
    cache = method.cache
    group = model.num_heads // model.num_kv_heads
    others = [h for h in range(model.num_kv_heads) if kv_heads is not None and h not in kv_heads]

    def attention(layer, q, k, v, positions):
        cache.write(layer, first, model.rotate(k, positions), v)
        queries = np.ascontiguousarray(model.rotate(q, positions).swapaxes(0, 1))
        view = cache.view(layer, first)
        out = np.empty_like(q)
        by_method = layers is None or layer in layers
        for t in range(len(queries)):
            view.length = first + t + 1
            if by_method:
                out[:, t] = method.attend(layer, view, queries[t])
            if others or not by_method:
                dense = fs.attend_dense(view, queries[t])[0]
                for head in others if by_method else range(model.num_kv_heads):
                    out[head * group : (head + 1) * group, t] = dense[head * group : (head + 1) * group]
        return out

    return model.forward(tokens, attention, first)


class CpuDecoding:
    """Texts that are read densely and then decoded by methods, here one at a time. gpu_decoding.GpuDecoding does the
    same for several: tokens are (texts, n) for both."""

    texts_at_once = 1

    def __init__(self, model: SmolLM2, folder: Path):
        """folder: where prefills are kept."""
        self.model, self.folder = model, folder
        self._like: tuple[np.ndarray, Optional[KvCache]] = np.empty(0, np.int32), None

    def prefill(
        self,
        tokens: np.ndarray,
        capacity: int,
        like: Optional[np.ndarray] = None,
        each_layer: Optional[Callable[[], object]] = None,
    ) -> KvCache:
        """The cache after tokens (1, n), with room for more. It is kept for other runs; where the text begins like
        another one (m,), that one's is, and only the rest is computed."""
        (text,) = tokens
        if like is None:
            return cached_prefill(self.model, text, capacity, self.folder, each_layer)
        if not np.array_equal(self._like[0], like):
            self._like = like, cached_prefill(self.model, like, len(like), self.folder, each_layer)
        m = min(len(like), len(text))
        cache = KvCache(self.model, capacity)
        cache.copy_of(self._like[1], int(np.argmin(np.append(text[:m] == like[:m], False))))
        prefill(self.model, text, cache, each_layer)
        return cache

    def methods(
        self,
        names: Iterable[str],
        cache: KvCache,
        trained: Optional[fs.PartitionSet],
        keys_per_cell: int = 32,
        trained_share: float = 0.5,
        refine: float = 6,
    ) -> Iterable[Method]:
        return make_methods(names, cache, self.model, trained, keys_per_cell, trained_share, refine)

    def decode(
        self,
        method: Method,
        tokens: np.ndarray,
        first: int,
        layers: Optional[Container[int]] = None,
        kv_heads: Optional[Container[int]] = None,
    ) -> np.ndarray:
        """Final hidden states (1, n, width) of tokens (1, n) at position first and after."""
        return decode(self.model, method, tokens[0], first, layers, kv_heads)[None]

    def nll(self, hidden: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Loss (1, n) of the tokens (1, n) that follow those with these hidden states."""
        # the model's own function passes over its first token and the last hidden state
        rows = np.vstack([hidden[0], hidden[0, -1:]])
        return self.model.nll(rows, np.concatenate([following[0, :1], following[0]]))[None]

    def likeliest(self, hidden: np.ndarray) -> np.ndarray:
        """The likeliest next tokens (1, n)."""
        return self.model.logits(hidden[0]).argmax(1)[None]
