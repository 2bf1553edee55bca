"""Tensors of torch through DLPack: read and written where they lie, their types, what is refused, what a call costs."""

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import faiss_saap as fs  # noqa: E402

TOKENS, HEADS_Q, HEADS_KV, D = 700, 6, 2, 16


def world(dtype=torch.float32, seed=5):
    """Keys and values (tokens, heads_kv, d) with an adapter that has read them, and queries of one token."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, TOKENS, HEADS_KV, D, generator=generator).to(dtype)
    q = torch.randn(1, HEADS_Q, D, generator=generator)
    adapter, sequence = indexed(fs.KvView.token_major(k, v))
    return k, v, q, adapter, sequence


def indexed(kv):
    adapter = fs.AttentionAdapter(HEADS_Q, HEADS_KV, D, sink=4, window=32, policy=fs.ProbePolicy(nprobe=64))
    sequence = adapter.create(fs.sequence_partitions(kv, 4, TOKENS, 16))
    adapter.append(sequence, kv)
    return adapter, sequence


def dense(q, k, v):
    k, v = (x.float().repeat_interleave(HEADS_Q // HEADS_KV, 1).transpose(0, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.float().transpose(0, 1), k, v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("major", ["token", "head", "strided", "paged"])
def test_caches_are_read_where_they_lie(dtype, major):
    k, v, q, _, _ = world(dtype)
    if major == "token":
        views = k, v, fs.KvView.token_major(k, v)
    elif major == "head":
        held = [x.transpose(0, 1).contiguous() for x in (k, v)]
        views = *(x.transpose(0, 1) for x in held), fs.KvView.head_major(*held)
    elif major == "strided":  # one sequence of a batch (tokens, batch, heads, 2, d) that holds keys beside values
        both = torch.stack([torch.zeros(TOKENS, HEADS_KV, 2, D, dtype=dtype), torch.stack([k, v], 2)], 1)
        views = both[:, 1, :, 0], both[:, 1, :, 1], fs.KvView.token_major(both[:, 1, :, 0], both[:, 1, :, 1])
    else:
        pages = [x.reshape(70, 10, HEADS_KV, D) for x in (k, v)]
        views = k, v, fs.KvView.paged(*pages, torch.arange(70, dtype=torch.int32))
    k, v, kv = views
    assert kv.dtype == str(dtype).removeprefix("torch.") and kv.length == TOKENS
    adapter, sequence = indexed(kv)
    asking = [fs.SequenceInput(sequence, kv)]
    for _ in range(2):
        result = adapter.attend(asking, q)
        np.testing.assert_allclose(result.output, dense(q, k, v), atol=1e-5)
        assert (result.keys_read == result.far_keys).all() and result.far_keys[0, 0] == TOKENS - 36
        v += 1  # what is written to the tensor later is what is read


def test_a_view_keeps_its_tensors():
    k, v, q, adapter, sequence = world()
    expected = dense(q, k, v)
    kv = fs.KvView.token_major(k, v)
    del k, v
    torch.full((8, TOKENS, HEADS_KV, D), 7.0)  # would take their memory
    np.testing.assert_allclose(adapter.attend([fs.SequenceInput(sequence, kv)], q).output, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["as they are", "bfloat16", "strided"])
def test_queries_and_results_are_tensors(how):
    k, v, q, adapter, sequence = world()
    if how == "bfloat16":
        q = q.bfloat16()
    elif how == "strided":
        q = q.transpose(0, 2).contiguous().transpose(0, 2)
    output, lse = torch.full((1, HEADS_Q, D), -1.0), torch.full((1, HEADS_Q), -1.0)
    result = adapter.attend([fs.SequenceInput(sequence, fs.KvView.token_major(k, v))], q, output=output, lse=lse)
    assert result.output is output and result.lse is lse
    torch.testing.assert_close(output, dense(q, k, v), atol=1e-5, rtol=0)
    assert torch.isfinite(lse).all() and (lse > 0).all()


def test_what_cannot_be_read_is_refused_with_a_sentence():
    k, v, q, adapter, sequence = world()
    asking = [fs.SequenceInput(sequence, fs.KvView.token_major(k, v))]
    for wrong, sentence in [
        (lambda: adapter.attend(asking, q.to("meta")), "queries is a torch.Tensor"),
        (lambda: adapter.attend(asking, q.int()), "queries has elements of type int32"),
        (lambda: adapter.attend(asking, q[:, :3]), r"queries has the shape \(1, 3, 16\)"),
        (lambda: adapter.attend(asking, q, output=torch.zeros(1, HEADS_Q, D, dtype=torch.float64)), "output must be"),
        (lambda: fs.KvView.token_major(k, v.half()), "different types"),
        (lambda: fs.KvView.token_major(k.double(), v.double()), "k has elements of type float64"),
    ]:
        with pytest.raises(fs.Error, match=sentence):
            wrong()


def test_a_call_costs_little(capsys):
    """A call with next to no work to do, all that torch and the binding add included."""
    k, v = torch.randn(2, 4, HEADS_KV, D)
    kv = fs.KvView.token_major(k, v)
    _, _, q, _, _ = world()
    adapter = fs.AttentionAdapter(HEADS_Q, HEADS_KV, D, [fs.kmeans_partition(k[:, 0].numpy(), 2)] * HEADS_KV)
    sequence = adapter.create()
    adapter.append(sequence, kv)
    asking, best = [fs.SequenceInput(sequence, kv)], {}
    for name, queries in (("numpy", q.numpy()), ("torch", q)):
        times = []
        for _ in range(3000):
            started = time.perf_counter()
            adapter.attend(asking, queries)
            times.append(time.perf_counter() - started)
        best[name] = 1e6 * min(times)
    with capsys.disabled():
        print(f" attend: {best['numpy']:.1f} µs with queries of numpy, {best['torch']:.1f} µs of torch", end="")
    assert best["torch"] < 20
