"""Models of Hugging Face transformers that decode through the library: attn_implementation="faiss_saap".

Importing this module registers the implementation. The model's cache is then a `SaapCache`, one for each batch of
texts; it keeps keys and values and an adapter for each layer. Where the package was built with CUDA, a model on a
CUDA device in float16 or bfloat16 has them there (`GpuAttentionAdapter`); all others have them in main memory:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="faiss_saap")
    cache = SaapCache(model.config, faiss_saap.read_partitions("model.saap"))
    model.generate(**tokens, past_key_values=cache)

Models of the Llama family (Llama, Mistral, Qwen2, Qwen3, ...) with any number of query heads for each KV head; no
sliding windows, no soft-capped logits, no attention sinks as parameters, no partial rotary embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import flash_attention_mask

from . import _core as fs

NAME = "faiss_saap"

#: what kernels there are for
GPU_DIMENSIONS, GPU_TYPES, GPU_QUERIES = (64, 96, 128, 256), (torch.float16, torch.bfloat16), 64


def attends_on_device(keys: torch.Tensor) -> bool:
    """Whether the index of a model with such keys, of shape (..., d), lies on their CUDA device."""
    return fs.has_cuda and keys.is_cuda and keys.shape[-1] in GPU_DIMENSIONS and keys.dtype in GPU_TYPES


def rope_of(config: PreTrainedConfig) -> fs.RopeParams:
    """The rotary embedding of a model, from its configuration."""
    config = config.get_text_config(decoder=True)
    rope = dict(config.rope_parameters or {})
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta", None)
    if theta is None:
        raise fs.Error(f"the configuration of {config.model_type} names no rope_theta, or one for each kind of layer")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise fs.Error("partial rotary embeddings (partial_rotary_factor) are not supported")
    if kind == "default":
        scaling = ""
    elif kind == "linear":
        scaling = f"linear:{rope['factor']:.17g}"
    elif kind in ("llama3", "yarn"):
        rope = {name: value for name, value in rope.items() if value is not None}
        if kind == "yarn":
            # where the configuration names neither, transformers takes it from here
            rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        scaling = f"{kind}:{json.dumps(rope, sort_keys=True)}"
    else:
        raise fs.Error(f"rope_type '{kind}' is not supported, only default, linear, llama3 and yarn")
    return fs.RopeParams(head_dim_of(config), float(theta), "half", scaling)


def head_dim_of(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass
class _Sequence:
    """One text of the batch."""

    padding: int = 0  #: slots at its beginning that hold no token of it
    number: Optional[int] = None  #: in the layer's adapter; None: not indexed yet
    learnt: int = 0  #: tokens when its own cells were learnt
    view: Optional[fs.KvView] = None  #: of its room in the buffers; None when they have moved


@dataclass
class _Options:
    partitions: Optional[list[list[list[fs.Partition]]]]  #: [layer][KV head], each a list
    policy: fs.ProbePolicy
    sink: int
    window: int
    keys_per_cell: int
    sparse_tokens: int
    heads_q: int

    def shape_of(self, keys: torch.Tensor) -> tuple[int, int, int]:
        """heads_q, heads_kv and d of keys (batch, heads_kv, tokens, d)."""
        return self.heads_q, keys.shape[1], keys.shape[3]

    def adapter_options(self, layer: int, scaling: float) -> dict[str, Any]:
        return {
            "partitions": self.partitions and self.partitions[layer], "sink": self.sink, "window": self.window,
            "scale": scaling, "policy": self.policy,
        }  # fmt: skip


class SaapLayer(CacheLayerMixin):
    """Keys, values and index of one layer: keys and values (batch, heads_kv, tokens, d) as in other caches."""

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, options: _Options):
        super().__init__()
        self.index = index
        self._options = options
        self._adapter: Optional[_CpuIndex | _GpuIndex] = None
        self._sequences: list[_Sequence] = []
        self._length = 0
        self._counted = torch.zeros(2, dtype=torch.int64)

    @property
    def keys_read(self) -> int:
        """Far keys read: sum over the tokens that attended sparsely and the KV heads."""
        return int(self._counted[0])

    @property
    def far_keys(self) -> int:
        """Far keys that there were for them."""
        return int(self._counted[1])

    # --- what transformers calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._k = self._v = torch.empty(0)
        self._sequences = [_Sequence() for _ in range(len(key_states))]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self._sequences):
            raise fs.Error(f"a batch of {len(key_states)} texts, but the cache holds {len(self._sequences)}")
        begin, end = self._length, self._length + key_states.shape[2]
        self._reserve(end, key_states, value_states)
        with torch.no_grad():
            self._k[:, :, begin:end] = key_states
            self._v[:, :, begin:end] = value_states
        self._set_length(end)
        # the way to the attention function, which is given these tensors but not the cache
        keys = self.keys
        keys.faiss_saap_layer = self
        return keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forgets all texts; the next batch may have another size."""
        for sequence in self._sequences:
            self._free(sequence)
        self._sequences, self._length = [], 0
        self.keys = self.values = None
        self._counted = torch.zeros(2, dtype=torch.int64)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise fs.Error(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        if not self.is_initialized:
            return
        end = max(0, self._length + tokens_to_remove)
        for b, sequence in enumerate(self._sequences):
            if end <= sequence.padding:
                self._free(sequence)
                sequence.padding, sequence.learnt, sequence.view = end, 0, None
            elif sequence.number is not None:
                self._adapter.truncate(sequence.number, end - sequence.padding, self._view(b))
        self._set_length(end)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self._sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these texts of the batch, in this order; one may be named several times."""
        if not self.is_initialized:
            return
        indices = indices.to(self._k.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        chosen = [self._sequences[int(b)] for b in indices]
        new = [
            _Sequence(s.padding, None if s.number is None else self._adapter.fork(s.number), s.learnt) for s in chosen
        ]
        for sequence in self._sequences:
            self._free(sequence)
        self._sequences = new
        self._k, self._v = self._k.index_select(0, indices), self._v.index_select(0, indices)
        self._set_length(self._length)

    # --- attention

    def attend(
        self,
        query: torch.Tensor,
        scaling: float,
        attention_mask: Optional[torch.Tensor],
        position_ids: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Output (batch, n, heads_q, d) of the newest n tokens, query (batch, heads_q, n, d), rotated."""
        n = query.shape[2]
        first = self._length == n
        self._set_padding(attention_mask, first)
        if self._options.partitions and self.index == 0:
            self._check_positions(position_ids)
        if self._adapter is None:
            kind = _GpuIndex if attends_on_device(self._k) else _CpuIndex
            self._adapter = kind(self._options, self.index, self._k, scaling)
        self._index()

        output = torch.zeros(len(query), n, query.shape[1], self._v.shape[3], dtype=query.dtype, device=query.device)
        asking = []
        for b, sequence in enumerate(self._sequences):
            if first or n > self._options.sparse_tokens or sequence.number is None:
                skipped = sequence.padding if first else 0
                output[b, skipped:] = self._dense(b, query[b, :, skipped:], scaling).transpose(0, 1)
            else:
                asking.append(b)
        if asking:
            rows = query[asking].transpose(1, 2).flatten(0, 1)
            inputs = [(self._sequences[b].number, self._view(b)) for b in asking]
            answer, counts = self._adapter.attend(inputs, n, rows)
            output[asking] = answer.to(query.device, query.dtype).unflatten(0, (len(asking), n))
            # the query heads of a KV head share their choice, or read alike in sum
            group = query.shape[1] // self._k.shape[1] if self._options.policy.share_group else 1
            self._counted = self._counted.to(counts.device) + counts[:, ::group].sum((0, 1))
        return output

    def _dense(self, b: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Output (heads_q, n, d) of the newest n tokens of one text."""
        begin = self._sequences[b].padding
        keys, values = (x[b : b + 1, :, begin:].to(query.device) for x in (self.keys, self.values))
        n, m = query.shape[1], keys.shape[2]
        mask = None
        if 1 < n < m:
            mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        return scaled_dot_product_attention(
            query[None], keys, values, mask, is_causal=n == m > 1, scale=scaling, enable_gqa=True
        )[0]

    def _index(self) -> None:
        """Brings the index of every text up to its newest token."""
        o, behind = self._options, []
        for b, sequence in enumerate(self._sequences):
            length = self._length - sequence.padding
            enough = max(2 * sequence.learnt, o.sink + o.window + 4 * o.keys_per_cell)
            if o.keys_per_cell and length >= enough:
                # Cells of rotated keys age as a text grows: they are learnt again whenever it has doubled.
                ncell = (length - o.sink) // o.keys_per_cell
                own = self._adapter.learn(self._view(b), length, ncell)
                self._free(sequence)
                sequence.number, sequence.learnt = self._adapter.create(own, length), length
            elif sequence.number is None and o.partitions:
                sequence.number = self._adapter.create(None, length)
            if sequence.number is not None:
                behind.append((sequence.number, self._view(b), length))
        if behind:
            self._adapter.append(behind)

    def _set_padding(self, mask: Optional[torch.Tensor], first: bool) -> None:
        """mask (batch, tokens): which slots hold tokens; None: all do."""
        if mask is not None and mask.ndim != 2:
            raise fs.Error(f"the attention mask has {mask.ndim} dimensions, expected (batch, tokens)")
        real = [self._length] * len(self._sequences) if mask is None else mask.sum(1).tolist()
        for b, (sequence, count) in enumerate(zip(self._sequences, real)):
            padding = self._length - count
            if first:
                if count == 0:
                    raise fs.Error(f"text {b} of the batch is nothing but padding")
                sequence.padding, sequence.view = padding, None
            if padding != sequence.padding or (padding and mask[b, :padding].any()):
                raise fs.Error(
                    f"text {b} of the batch: its attention mask must be zeros before its tokens and ones after "
                    f"(padding_side='left'), and begin alike in every pass"
                )

    def _check_positions(self, position_ids: Optional[torch.Tensor]) -> None:
        """Trained cells are of keys that are rotated back, which needs their positions."""
        if position_ids is None:
            return
        last = position_ids[:, -1].tolist() * (len(self._sequences) if len(position_ids) == 1 else 1)
        for b, (sequence, position) in enumerate(zip(self._sequences, last)):
            expected = self._length - sequence.padding - 1
            if position != expected:
                raise fs.Error(
                    f"text {b} of the batch: its newest token has position {position}, expected {expected}: pass "
                    f"position_ids that count from 0 at its first token, as generate() does"
                )

    # --- memory

    def _view(self, b: int) -> fs.KvView:
        """Of a text's room in the buffers, its tokens and those that will come."""
        sequence = self._sequences[b]
        if sequence.view is None:
            sequence.view = fs.KvView.head_major(*(x[b, :, sequence.padding :] for x in (self._k, self._v)))
        return sequence.view

    def _reserve(self, tokens: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Room for so many tokens in the buffers (batch, heads_kv, capacity, d); they double when they are full."""
        if self._k.numel() and tokens <= self._k.shape[2]:
            return
        capacity = max(tokens, 256, 2 * self._length)
        device = key_states.device if attends_on_device(key_states) else "cpu"

        def grown(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(False):  # else they could not be written to outside that mode
                buffer = torch.empty(*new.shape[:2], capacity, new.shape[3], dtype=new.dtype, device=device)
            if self._length:
                buffer[:, :, : self._length] = old[:, :, : self._length]
            return buffer

        self._k, self._v = grown(self._k, key_states), grown(self._v, value_states)
        for sequence in self._sequences:
            sequence.view = None

    def _set_length(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._k[:, :, :length], self._v[:, :, :length]

    def _free(self, sequence: _Sequence) -> None:
        if sequence.number is not None:
            self._adapter.free(sequence.number)
            sequence.number = None


class _CpuIndex:
    """The adapter of one layer in main memory."""

    def __init__(self, options: _Options, layer: int, keys: torch.Tensor, scaling: float):
        self._options = options
        self._adapter = fs.AttentionAdapter(
            *options.shape_of(keys), **options.adapter_options(layer, scaling), key_codes=options.policy.refine > 1
        )

    def learn(self, view: fs.KvView, length: int, ncell: int) -> list[list[fs.Partition]]:
        """Cells of the first `length` tokens of a text."""
        view.length = length
        return fs.sequence_partitions(view, self._options.sink, length, ncell)

    def create(self, own: Optional[list[list[fs.Partition]]], tokens: int) -> int:
        return self._adapter.create(own)

    def append(self, texts: list[tuple[int, fs.KvView, int]]) -> None:
        """texts: number, view and tokens of each, those among them that are new are taken note of."""
        for number, view, length in texts:
            view.length = length
            self._adapter.append(number, view)

    def attend(
        self, texts: list[tuple[int, fs.KvView]], n: int, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (tokens, heads_q, d) of the newest n tokens of each text, and the far keys read and there (tokens,
        heads_q, 2)."""
        inputs = [fs.SequenceInput(number, view, n) for number, view in texts]
        result = self._adapter.attend(inputs, queries.to("cpu").contiguous())
        counts = torch.stack([torch.from_numpy(x) for x in (result.keys_read, result.far_keys)], -1)
        return torch.from_numpy(result.output), counts

    def truncate(self, number: int, length: int, view: fs.KvView) -> None:
        self._adapter.truncate(number, length, view)

    def fork(self, number: int) -> int:
        return self._adapter.fork(number)

    def free(self, number: int) -> None:
        self._adapter.free(number)

    def bytes_used(self) -> int:
        return self._adapter.bytes_used()


class _GpuIndex(_CpuIndex):
    """The same on the CUDA device of the keys."""

    def __init__(self, options: _Options, layer: int, keys: torch.Tensor, scaling: float):
        self._options = options
        self._adapter = fs.GpuAttentionAdapter(
            *options.shape_of(keys), **options.adapter_options(layer, scaling), device=keys.device.index or 0
        )
        self._planned: tuple[Any, Any] = None, None  #: what the batch that decodes was made of, and it

    def learn(self, view: fs.KvView, length: int, ncell: int) -> list[list[fs.Partition]]:
        return fs.gpu_sequence_partitions(view, self._options.sink, length, ncell)

    def create(self, own: Optional[list[list[fs.Partition]]], tokens: int) -> int:
        return self._adapter.create(own, max(4096, 2 * tokens))

    def append(self, texts: list[tuple[int, fs.KvView, int]]) -> None:
        new = [(number, view, length - self._adapter.length(number)) for number, view, length in texts]
        steps = {n for _, _, n in new}
        if len(steps) == 1 and max(steps) <= self._options.sparse_tokens:
            self._adapter.append(self._plan([(number, view) for number, view, _ in new], *steps))
        else:
            self._adapter.append(self._adapter.plan([fs.SequenceInput(*text) for text in new if text[2]]))

    def attend(
        self, texts: list[tuple[int, fs.KvView]], n: int, queries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.empty(queries.shape, dtype=torch.float32, device=queries.device)
        stats = torch.empty(*queries.shape[:2], 4, dtype=torch.int64, device=queries.device)
        self._adapter.attend(self._plan(texts, n), queries.contiguous(), output, None, stats)
        return output, stats[..., 1:3]

    def _plan(self, texts: list[tuple[int, fs.KvView]], n: int) -> fs.GpuBatch:
        """A batch in which n tokens of each text are appended and attend; the last one where it is that."""
        what = n, [number for number, _ in texts], [view for _, view in texts]
        if self._planned[0] != what:
            self._planned = what, self._adapter.plan([fs.SequenceInput(*text, n) for text in texts])
        return self._planned[1]


class SaapCache(Cache):
    """The cache of a model with attn_implementation="faiss_saap": keys, values and their index in all layers.

    A prefill is attended densely; after it every token enters the index and attends to sink, window and the far keys
    of the cells that its queries probe. Texts of a batch are padded on the left and are independent of each other.
    `reset()` makes room for other texts, `crop(-n)` forgets the last n tokens, beams fork.

    config: of the model. partitions: trained ones, of traces that `contrib/export_trace.py --model` made of it; None:
    only cells of each text itself. policy: which cells are probed; None: 5 % of the far keys, shared by the query heads
    of a KV head. keys_per_cell: of the cells that are learnt from each text's own rotated keys, at its prefill and
    whenever it has doubled; 0: none, only partitions. With both, each gets its share of the budget. sparse_tokens:
    passes of more tokens are prefills.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        partitions: Optional[fs.PartitionSet] = None,
        *,
        policy: Optional[fs.ProbePolicy] = None,
        sink: int = 16,
        window: int = 512,
        keys_per_cell: int = 32,
        sparse_tokens: int = 16,
    ):
        config = config.get_text_config(decoder=True)
        for kind in set(getattr(config, "layer_types", None) or ()):
            if kind != "full_attention":
                raise fs.Error(f"the model has layers of type '{kind}', only full attention is supported")
        if partitions is None and keys_per_cell == 0:
            raise fs.Error("without partitions, keys_per_cell must be positive")
        if keys_per_cell < 0 or not 1 <= sparse_tokens <= GPU_QUERIES:
            raise fs.Error(
                f"keys_per_cell = {keys_per_cell} must not be negative, sparse_tokens = {sparse_tokens} from 1 to "
                f"{GPU_QUERIES}"
            )
        layers, heads = range(config.num_hidden_layers), range(config.num_key_value_heads)
        options = _Options(
            partitions=None,
            policy=policy or fs.ProbePolicy(nprobe=65536, max_selectivity=0.05),
            sink=sink,
            window=window,
            keys_per_cell=keys_per_cell,
            sparse_tokens=sparse_tokens,
            heads_q=config.num_attention_heads,
        )
        if partitions is not None:
            rope, trained = rope_of(config), partitions.rope
            if (trained.d, trained.layout) != (rope.d, rope.layout):
                raise fs.Error(
                    f"the partitions are of heads of {trained.d} components with RoPE layout '{trained.layout}', the "
                    f"model has {rope.d} and '{rope.layout}': train them on traces of this model"
                )
            found = [[partitions.find(layer, head).partition for head in heads] for layer in layers]
            options.partitions = [[[fs.Partition(p.key, p.query, rope)] for p in of_layer] for of_layer in found]
        super().__init__(layers=[SaapLayer(layer, options) for layer in layers])

    @property
    def selectivity(self) -> float:
        """Share of the far keys that sparse attention has read so far, mean over tokens, layers and KV heads."""
        far = sum(layer.far_keys for layer in self.layers)
        return sum(layer.keys_read for layer in self.layers) / far if far else 0.0


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: Optional[float] = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls."""
    layer = getattr(key, "faiss_saap_layer", None)
    if layer is None:
        raise fs.Error("attn_implementation='faiss_saap' needs a cache: pass past_key_values=SaapCache(model.config)")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise fs.Error(f"attention with {name} is not supported")
    if torch.is_grad_enabled() and query.requires_grad:
        raise fs.Error("this attention has no gradient: call the model under torch.no_grad()")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scaling, attention_mask, kwargs.get("position_ids")), None


AttentionInterface.register(NAME, attention)
# what this one makes is the mask of padding alone, or None: causality needs no mask here
AttentionMaskInterface.register(NAME, flash_attention_mask)
