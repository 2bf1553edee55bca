"""The Python package: Faiss's manners, attention against numpy, views without copies, errors, threads."""

import ast
import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import faiss_saap as fs

D, HEADS_Q, HEADS_KV = 16, 6, 2
GROUP = HEADS_Q // HEADS_KV


@pytest.fixture
def random():
    return np.random.default_rng(5)


# --- index


def trained_index(random, description="AIVF8,Flat", metric=fs.METRIC_INNER_PRODUCT, n=500):
    x = random.standard_normal((n, D), dtype=np.float32)
    index = fs.IndexAsymmetricIVF(D, description, metric)
    assert not index.is_trained and index.partition is None
    index.train(x)
    return index, x


def test_search_with_all_cells_is_exact(random):
    index, x = trained_index(random)
    index.add(x)
    assert (index.ntotal, index.d, index.ncell, index.nprobe) == (len(x), D, 8, 1)
    index.nprobe = 8
    queries = random.standard_normal((20, D), dtype=np.float32)
    distances, ids = index.search(queries, 5)
    expected = np.argsort(-queries @ x.T, axis=1)[:, :5]
    assert ids.dtype == np.int64 and distances.dtype == np.float32
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(queries @ x.T, expected, 1), rtol=1e-4)
    # what is no contiguous float32 is converted
    np.testing.assert_array_equal(index.search(np.asfortranarray(queries.astype(np.float64)), 5)[1], expected)


def test_fewer_probes_read_fewer_vectors(random):
    index, x = trained_index(random)
    index.add(x)
    few, all_cells = fs.SearchParameters(nprobe=2), fs.SearchParameters(nprobe=8)
    index.search(x[:10], 3, params=few)
    index.search(x[:10], 3, params=all_cells)
    assert all_cells.stats.vectors_read == 10 * len(x) > few.stats.vectors_read > 0
    cells = index.assign_queries(x[:10], 2)
    np.testing.assert_array_equal(index.search_preassigned(x[:10], 3, cells)[1], index.search(x[:10], 3, few)[1])
    index.set_parameters("nprobe=3")
    assert index.nprobe == 3


def test_ids_removal_and_range_search(random):
    index, x = trained_index(random, metric=fs.METRIC_L2)
    ids = np.arange(len(x)) * 3 + 1
    index.add_with_ids(x, ids)
    index.nprobe = index.ncell
    limits, distances, found = index.range_search(x[:4], 1e-3)
    np.testing.assert_array_equal(limits, np.arange(5))
    np.testing.assert_array_equal(found, ids[:4])
    assert index.remove_ids(ids[:2]) == 2 and index.ntotal == len(x) - 2
    np.testing.assert_array_equal(index.search(x[:4], 1)[1][2:, 0], ids[2:4])
    assert not np.isin(index.search(x[:4], 5)[1], ids[:2]).any()
    index.set_direct_map(True)
    np.testing.assert_array_equal(index.reconstruct(int(ids[7])), x[7])
    index.reset()
    assert index.ntotal == 0 and index.is_trained
    assert fs.__version__.count(".") == 2


def test_files_keep_the_index(random, tmp_path):
    index, x = trained_index(random, "SphAIVF8,SQfp16")
    index.add(x)
    fs.write_index(index, str(tmp_path / "x.idx"))
    for copy in (fs.read_index(str(tmp_path / "x.idx")), fs.deserialize_index(fs.serialize_index(index))):
        for mine, theirs in zip(index.search(x[:9], 4), copy.search(x[:9], 4)):
            np.testing.assert_array_equal(mine, theirs)


def test_given_cells_and_another_query_assigner(random):
    x = random.standard_normal((400, D), dtype=np.float32)
    partition = fs.kmeans_partition(x, 8, fs.NEEDS_POST_ROPE, fs.KMeansParams(niter=3, seed=7))
    index = fs.index_factory(D, "AIVF8,Flat", fs.METRIC_INNER_PRODUCT, partition)
    assert index.is_trained
    index.add(x)
    index.set_query_assigner(fs.symmetric(partition).query)
    centroids = partition.key.centroids
    nearest = np.argmin(((x[:30, None] - centroids) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(index.assign_queries(x[:30], 1)[:, 0], nearest)
    np.testing.assert_array_equal(partition.key.assign(1, post_rope=x[:30])[0][:, 0], nearest)
    means = np.stack([x[partition.key.assign(1, post_rope=x)[0][:, 0] == c].mean(0) for c in range(8)])
    np.testing.assert_allclose(partition.query.scores(post_rope=x), x @ means.T, atol=1e-4)


# --- rotary embedding


def test_rope_is_the_definition_and_undone(random):
    rope = fs.RopeParams(d=D, theta=1000.0, layout="half")
    x, position = random.standard_normal((7, D), dtype=np.float32), np.arange(7) * 100
    rotated = fs.RotaryEmbedding(rope).rotate(x, position)
    angle = position[:, None] * 1000.0 ** (-np.arange(0, D, 2) / D)
    a, b = x[:, : D // 2], x[:, D // 2 :]
    expected = np.hstack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])
    np.testing.assert_allclose(rotated, expected, atol=1e-5)
    assert rope == fs.RopeParams(d=D, theta=1000.0) != fs.RopeParams(d=D, theta=999.0) and rope != "rope"
    np.testing.assert_allclose(fs.RotaryEmbedding(rope).derotate(rotated, position), x, atol=1e-5)


# --- attention


def dense(q, k, v):
    """Output [Hq, d_v] and LSE [Hq] of q [Hq, d] over k, v [n, Hkv, d]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("hd,nhd->hn", q, k.repeat(GROUP, axis=1)) / np.sqrt(q.shape[1])
    lse = np.logaddexp.reduce(scores, axis=1)
    return np.einsum("hn,nhd->hd", np.exp(scores - lse[:, None]), v.repeat(GROUP, axis=1)), lse


def make_adapter(random, **options):
    options = {"sink": 4, "window": 32, "dense_below": 0, **options}
    keys = random.standard_normal((600, D), dtype=np.float32)
    partitions = [fs.kmeans_partition(keys, 12) for _ in range(HEADS_KV)]
    return fs.AttentionAdapter(HEADS_Q, HEADS_KV, D, partitions, **options)


def bits_of_bfloat16(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def float_of_bits(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def as_token_major(x):
    return np.ascontiguousarray(x)


def as_strided(x):
    wide = np.zeros((x.shape[0] * 2, x.shape[1] + 1, x.shape[2] + 3), x.dtype)
    wide[::2, 1:, 2:-1] = x
    return wide[::2, 1:, 2:-1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "bfloat16"])
@pytest.mark.parametrize("layout", ["token_major", "strided", "head_major", "paged"])
def test_all_cells_probed_is_dense_attention(random, dtype, layout):
    n = 300
    k, v = random.standard_normal((2, n, HEADS_KV, D), dtype=np.float32)
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        stored = k, v = k.astype(ml_dtypes.bfloat16), v.astype(ml_dtypes.bfloat16)
    elif dtype == "uint16":
        stored = bits_of_bfloat16(k), bits_of_bfloat16(v)
        k, v = map(float_of_bits, stored)
    else:
        stored = k, v = k.astype(dtype), v.astype(dtype)
    if layout == "paged":
        page, table = 16, random.permutation(25).astype(np.int32)[: -(-n // 16)]
        pages = [np.zeros((25, page, HEADS_KV, D), x.dtype) for x in stored]
        for t in range(n):
            for to, x in zip(pages, stored):
                to[table[t // page], t % page] = x[t]
        view = fs.KvView.paged(*pages, table, n)
    elif layout == "head_major":
        view = fs.KvView.head_major(*(np.ascontiguousarray(x.swapaxes(0, 1)) for x in stored))
    else:
        view = fs.KvView.token_major(*map(as_strided if layout == "strided" else as_token_major, stored))
    assert view.dtype == ("bfloat16" if dtype == "uint16" else dtype) and (view.length, view.heads) == (n, HEADS_KV)

    adapter = make_adapter(random, policy=fs.ProbePolicy(nprobe=12))
    sequence = adapter.create()
    adapter.append(sequence, view)
    q = random.standard_normal((HEADS_Q, D), dtype=np.float32)
    result = adapter.attend([fs.SequenceInput(sequence, view)], q)
    output, lse = dense(q, k, v)
    assert result.output.shape == (1, HEADS_Q, D) and result.lse.shape == (1, HEADS_Q)
    np.testing.assert_allclose(result.output[0], output, atol=2e-5)
    np.testing.assert_allclose(result.lse[0], lse, atol=2e-5)
    assert (result.selectivity == 1).all() and (result.far_keys == n - 36).all() and (result.cells > 1).all()


def test_a_batch_is_its_sequences_and_keeps_the_budget(random):
    adapter = make_adapter(random, policy=fs.ProbePolicy(max_selectivity=0.3))
    batch, queries, expected = [], [], []
    for n, q_len in ((500, 1), (350, 3)):
        k, v = random.standard_normal((2, n, HEADS_KV, D), dtype=np.float32)
        view = fs.KvView.token_major(k, v)
        sequence = adapter.create()
        adapter.append(sequence, view)
        batch.append(fs.SequenceInput(sequence, view, q_len))
        queries.append(random.standard_normal((q_len, HEADS_Q, D), dtype=np.float32))
        expected.append(adapter.attend([batch[-1]], queries[-1]))
    together = adapter.attend(batch, np.concatenate(queries))
    np.testing.assert_array_equal(together.output, np.concatenate([e.output for e in expected]))
    assert 0 < together.selectivity.max() <= 0.35
    # one policy for this call, and the two halves of attend
    probed = adapter.route(batch, np.concatenate(queries))
    assert len(probed.begin) == 4 * HEADS_KV + 1 and probed.share_group
    again = adapter.attend_preassigned(
        batch, np.concatenate(queries), fs.ProbedCells(probed.begin, probed.cells, probed.share_group)
    )
    np.testing.assert_array_equal(again.output, together.output)
    np.testing.assert_array_equal(again.keys_read, together.keys_read)
    more = adapter.attend(batch, np.concatenate(queries), fs.ProbePolicy(nprobe=12))
    assert (more.selectivity == 1).all()
    asked = adapter.attend([fs.SequenceInput(batch[1].sequence, batch[1].kv, 1, [347])], queries[1][:1])
    np.testing.assert_array_equal(asked.output, expected[1].output[:1])
    # inputs that nobody else holds
    made = (fs.SequenceInput(b.sequence, b.kv, 1, [b.kv.length - 3]) for b in batch)
    asked = adapter.attend(made, np.concatenate([q[:1] for q in queries]))
    np.testing.assert_array_equal(asked.output[1:], expected[1].output[:1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_batch_of_nothing_answers_nothing(random, dtype):
    adapter = make_adapter(random)
    nothing = np.zeros((0, HEADS_Q, D), dtype)
    result = adapter.attend([], nothing)
    assert result.output.shape == (0, HEADS_Q, D) and result.lse.shape == (0, HEADS_Q)
    assert result.selectivity.shape == (0, HEADS_Q)
    probed = adapter.route([], nothing)
    assert list(probed.begin) == [0] and len(probed.cells) == 0
    with pytest.raises(fs.Error, match=r"queries has the shape \(1, 6, 16\), expected \(0, 6, 16\)"):
        adapter.attend([], np.zeros((1, HEADS_Q, D), dtype))


def test_far_keys_merge_with_a_dense_kernel_of_the_callers(random):
    k, v = random.standard_normal((2, 400, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(k, v)
    adapter = make_adapter(random, attend_dense=False, policy=fs.ProbePolicy(nprobe=12))
    sequence = adapter.create()
    adapter.append(sequence, view)
    q = random.standard_normal((HEADS_Q, D), dtype=np.float32)
    sink, window = fs.attend_dense(view, q, 0, 4), fs.attend_dense(view, q, 400 - 32)
    output, lse = fs.merge_states(*sink, *window)
    output, lse = output[None], lse[None]
    result = adapter.attend([fs.SequenceInput(sequence, view)], q, output=output, lse=lse, merge=True)
    assert result.output is output and result.lse is lse
    for mine, theirs in zip((output[0], lse[0]), dense(q, k, v)):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    slots = np.arange(0, 400, 3, dtype=np.int32)
    for mine, theirs in zip(
        fs.attend_slots(view, 1, q[GROUP:], slots), dense(q, k[slots], v[slots])
    ):
        np.testing.assert_allclose(mine, theirs[GROUP:], atol=1e-5)


def test_slots_and_cells_are_integers_of_32_bits(random):
    k = random.standard_normal((8, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(k, k)
    q = random.standard_normal((1, D), dtype=np.float32)
    expected = fs.attend_slots(view, 0, q, np.array([1, 5], np.int32))
    for slots in ([1, 5], (1, 5), np.array([1, 5]), np.array([1, 5], np.uint8), Tensor(np.array([1, 5]))):
        for mine, theirs in zip(fs.attend_slots(view, 0, q, slots), expected):
            np.testing.assert_array_equal(mine, theirs)
    assert fs.attend_slots(view, 0, q, [])[1] == -np.inf
    with pytest.raises(fs.Error, match=r"slots\[1\] = 4294967297 is beyond 32 bits"):
        fs.attend_slots(view, 0, q, np.array([1, 2**32 + 1]))
    with pytest.raises(fs.Error, match="slots has elements that are no integers"):
        fs.attend_slots(view, 0, q, np.array([1.7]))
    with pytest.raises(fs.Error, match=r"cells\[0\] = 4294967297"):
        fs.ProbedCells(np.array([0, 1]), [2**32 + 1])
    np.testing.assert_array_equal(fs.ProbedCells(np.array([0, 2]), [3, 4]).cells, [3, 4])


def test_scale_is_what_was_given(random):
    k = random.standard_normal((8, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(k, k)
    q = random.standard_normal((HEADS_Q, D), dtype=np.float32)
    np.testing.assert_array_equal(fs.attend_dense(view, q)[1], fs.attend_dense(view, q, scale=D**-0.5)[1])
    np.testing.assert_array_equal(fs.attend_dense(view, q, scale=-0.5)[1], fs.attend_dense(view, -q, scale=0.5)[1])
    with pytest.raises(fs.Error, match="scale = nan"):
        fs.attend_slots(view, 0, q, [1], scale=np.nan)


def test_pages_are_checked_when_they_are_read():
    pages = np.ones((5, 4, HEADS_KV, D), np.float32)
    table = np.array([0, 3, -1, -1], np.int32)
    view = fs.KvView.paged(pages, pages, table, length=8)
    q = np.ones((HEADS_Q, D), np.float32)
    view.length = 9
    for read in (lambda: fs.attend_dense(view, q), lambda: fs.attend_slots(view, 0, q, [0])):
        with pytest.raises(fs.Error, match=r"page_table\[2\] = -1"):
            read()
    table[2] = 1
    np.testing.assert_array_equal(fs.attend_dense(view, q)[0], 1)


def test_the_cache_is_read_where_it_lies_and_kept_alive(random):
    cache = random.standard_normal((2, 200, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(cache[0], cache[1], 150)
    assert view.capacity == 200
    adapter = make_adapter(random)
    sequence = adapter.create()
    adapter.append(sequence, view)
    q = random.standard_normal((HEADS_Q, D), dtype=np.float32)
    asking = [fs.SequenceInput(sequence, view)]
    before = adapter.attend(asking, q).output
    cache[1] += 1
    np.testing.assert_allclose(adapter.attend(asking, q).output, before + 1, atol=1e-5)
    view.length = 151
    adapter.append(sequence, view)
    assert adapter.length(sequence) == 151
    expected = adapter.attend(asking, q).output
    del cache, view
    gc.collect()
    rubbish = [np.full((200, HEADS_KV, D), np.nan, np.float32) for _ in range(4)]
    np.testing.assert_array_equal(adapter.attend(asking, q).output, expected)
    del rubbish


class Tensor:
    """Something that is no numpy array and speaks DLPack, as a framework's tensor does."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_dlpack_tensor_is_read_without_a_copy(random):
    k, v = random.standard_normal((2, 300, HEADS_KV, D)).astype(np.float16)
    q = random.standard_normal((1, HEADS_Q, D)).astype(np.float16)
    adapter = make_adapter(random)
    view = fs.KvView.token_major(Tensor(k), Tensor(v))
    sequence = adapter.create()
    adapter.append(sequence, view)
    asking = [fs.SequenceInput(sequence, view)]
    before = adapter.attend(asking, Tensor(q)).output
    np.testing.assert_array_equal(before, adapter.attend(asking, q.astype(np.float32)).output)
    output, lse = np.empty_like(before), np.empty((1, HEADS_Q), np.float32)
    assert (adapter.attend(asking, Tensor(q), output=Tensor(output), lse=lse).lse == lse).all()
    np.testing.assert_array_equal(output, before)
    v[:] = 2
    np.testing.assert_allclose(adapter.attend(asking, Tensor(q)).output, 2, atol=1e-5)


def test_forks_truncation_and_files(random, tmp_path):
    k, v = random.standard_normal((2, 400, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(k, v, 300)
    adapter = make_adapter(random)
    a = adapter.create(fs.sequence_partitions(view, 4, 300, 6))
    assert adapter.npartition(a, 0) == 2 and adapter.partition(a, 1, 1).ncell == 6
    adapter.append(a, view)
    assert adapter.cell_counts(a, 0).sum() == 300 - 4 - 32
    b = adapter.fork(a)
    view.length = 400
    adapter.append(b, view)
    q = random.standard_normal((HEADS_Q, D), dtype=np.float32)
    at_300 = fs.KvView.token_major(k, v, 300)
    expected = adapter.attend([fs.SequenceInput(a, at_300)], q).output
    adapter.truncate(b, 300, view)
    np.testing.assert_array_equal(adapter.attend([fs.SequenceInput(b, at_300)], q).output, expected)
    adapter.save(a, str(tmp_path / "a"))
    c = adapter.load(str(tmp_path / "a"))
    np.testing.assert_array_equal(adapter.attend([fs.SequenceInput(c, at_300)], q).output, expected)
    assert adapter.bytes_used() > 0
    adapter.free(a)
    with pytest.raises(fs.Error):
        adapter.length(a)


# --- training


@pytest.fixture(scope="module")
def trained(pytestconfig):
    import os

    trace = fs.Trace(os.environ["FAISS_SAAP_TRACE"])
    steps = []
    params = fs.TrainingParams(ncell=16, width=16, steps=20, batch=32, window=512)
    partition = fs.train_partition([trace], 9, 0, params, lambda *of_step: steps.append(of_step))
    return trace, params, partition, steps


def test_training_files_and_decoding_with_them(trained, tmp_path):
    trace, params, partition, steps = trained
    assert [s[0] for s in steps] == list(range(1, 21)) and all(np.isfinite(s[1]) for s in steps)
    assert len(partition.heads) == 3 and 0 < partition.heads[0].recall <= 1.05
    assert params.centroid_dtype == params.dtype == "bfloat16"
    assert not (partition.partition.key.centroids.view(np.uint32) & 0xFFFF).any()
    path = tmp_path / "p.saap"
    fs.write_partitions(fs.PartitionSet([partition], model="m", sink=16, window=512, texts=["t"]), path)
    read = fs.read_partitions(path)
    assert (read.model, read.window, read.texts) == ("m", 512, ["t"])
    read.plans = [fs.ProbePlan(layer=9, kv_head=0)]
    plan = read.plans[0]  # a copy
    read.plans = []
    assert plan.layer == 9 and read.plans == []
    read.check_rope(trace.rope)
    mine, theirs = partition.partition, read.find(9, 0).partition
    q = trace.queries(9, 1)[:5]
    head = np.full(5, 1, np.int32)
    scores = mine.query.scores(pre_rope=q, head=head)
    assert scores.shape == (5, 16) and mine.ncell == 16
    np.testing.assert_array_equal(theirs.query.scores(pre_rope=q, head=head), scores)
    np.testing.assert_array_equal(read.find(9, 0).blend, partition.blend)
    rebuilt = fs.QueryClassifier(mine.query.parameters(), d=64, ncell=16, group=3, width=16)
    np.testing.assert_array_equal(rebuilt.scores(pre_rope=q, head=head), scores)

    # every token of a text in turn, as a model decodes: pre-RoPE needs are derived from the rotated cache
    n = 2000
    rope, position = fs.RotaryEmbedding(trace.rope), np.arange(n)
    k = rope.rotate(trace.keys(9, 0)[:n], position)[:, None]
    v = trace.values(9, 0)[:n, None]
    q = np.stack([rope.rotate(trace.queries(9, h)[n - 1 : n], position[-1:])[0] for h in range(3)])
    exact, _ = fs.attend_dense(fs.KvView.token_major(k, v), q)
    for cells in (theirs, read.find(9, 0).blended()):
        adapter = fs.AttentionAdapter(3, 1, 64, [cells], window=512)
        view = fs.KvView.token_major(k, v, n)
        sequence = adapter.create()
        adapter.append(sequence, view)
        all_read = adapter.attend([fs.SequenceInput(sequence, view)], q)
        np.testing.assert_allclose(all_read.output[0], exact, atol=1e-4)


def test_what_a_callback_raises_ends_the_training(trained):
    trace, params, _, _ = trained

    def stop(step, loss, recall):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fs.train_partition([trace], 9, 0, params, stop)


# --- errors


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda i, x: i.search(x[:, :5], 3), r"x has the shape (4, 5), expected (any, 16)"),
        (lambda i, x: i.search(x, 0), "k = 0"),
        (lambda i, x: i.add(x * np.nan), "finite"),
        (lambda i, x: i.assign_queries(x, 9), "nprobe = 9, must be 1 to ncell = 8"),
        (lambda i, x: fs.index_factory(D, "AIVF8,Nonsense"), "Nonsense"),
        (lambda i, x: fs.read_index("/nowhere/at all"), "/nowhere/at all"),
        (lambda i, x: fs.read_partitions("/nowhere/at all"), "/nowhere/at all"),
        (lambda i, x: fs.kmeans_partition(x, 5), "5"),
        (lambda i, x: fs.RopeParams(d=8, layout="spiral"), "layout = 'spiral'"),
        (lambda i, x: fs.ProbePolicy(nprobe=0), "nprobe = 0"),
        (lambda i, x: fs.AttentionAdapter(3, 2, D), "heads_q = 3"),
        (lambda i, x: fs.KvView.token_major(x, x), "k has the shape (4, 16), expected 3 dimensions"),
        (lambda i, x: fs.KvView.token_major([1], [1]), "k is a list"),
        (lambda i, x: fs.KvView.token_major(np.zeros((3, 1, D)), np.zeros((3, 1, D))), "k has elements"),
        (lambda i, x: fs.KvView.token_major(x[:, None, ::2], x[:, None]), "contiguous"),
        (lambda i, x: fs.KvView.token_major(x[:, None], x[:2, None]), "v has the shape (2, 1, 16), expected (4, 1,"),
        (lambda i, x: fs.KvView.token_major(x[:, None], x[:, None], 5), "length = 5, the arrays hold 4 tokens"),
        (lambda i, x: fs.TrainingParams(cells=3), "no field 'cells'"),
        (lambda i, x: fs.TrainingParams(centroid_dtype="float16"), "centroid_dtype = 'float16'"),
        (lambda i, x: fs.CellMeanAssigner(D, 3).scores(post_rope=x), "stat"),
        (lambda i, x: i.set_query_assigner(fs.CellMeanAssigner(D, 8)), "statistics"),
        (lambda i, x: i.remove_ids(np.array([1.9])), "ids has elements that are no integers"),
        (lambda i, x: i.add_with_ids(x, [0, 1, 2.5, 3]), "ids has elements that are no integers"),
        (lambda i, x: i.search_preassigned(x, 3, np.zeros((4, 1))), "cells has elements that are no integers"),
        (lambda i, x: fs.RotaryEmbedding(fs.RopeParams(d=D)).rotate(x, np.arange(4.0)), "position has elements"),
        (lambda i, x: fs.AttentionAdapter(6, 2, D, "ab"), "partitions hold a str"),
        (lambda i, x: fs.AttentionAdapter(6, 2, D).attend([3], x), "batch[0] is a int, expected a SequenceInput"),
        (lambda i, x: fs.train_partition([3], 0, 0), "texts[0] is a int, expected a Trace"),
        (lambda i, x: fs.key_code_size(2**31 - 1), "d = 2147483647"),
    ],
)
def test_errors_are_sentences_that_name_the_argument(random, wrong, sentence):
    index, x = trained_index(random)
    with pytest.raises(fs.Error) as error:
        wrong(index, x[:4])
    assert isinstance(error.value, RuntimeError)
    assert sentence in str(error.value), str(error.value)
    assert ".cpp" not in str(error.value) and "' failed" not in str(error.value)
    index.search(x[:4], 3)  # as before


def test_results_that_fit_no_memory_are_refused(random):
    index, x = trained_index(random)
    with pytest.raises((TypeError, ValueError)):
        fs.write_index(index, "a\0b")
    for n, k in ((4, 2**62), (8, 2**61), (1, 2**62)):
        with pytest.raises(MemoryError):
            index.search(x[:n], k)
        with pytest.raises(MemoryError):
            index.search_preassigned(x[:n], k, np.zeros((n, 1), np.int64))


def test_lists_and_other_types_are_taken_for_vectors_and_ids():
    x = np.arange(8 * D).reshape(8, D) % 7
    index = fs.index_factory(D, "AIVF2,Flat", fs.METRIC_L2)
    index.train(x.tolist())
    index.add_with_ids(x.astype(">f4"), list(range(8)))
    index.nprobe = 2
    np.testing.assert_array_equal(index.search(x.astype(np.float16), 1)[0], 0)
    assert index.remove_ids([1, 2]) == 2
    p = fs.RopeParams(d=8, theta=500.0)
    assert p == fs.RopeParams(d=8, theta=500.0) and len({p, fs.RopeParams(d=8, theta=500.0), fs.RopeParams(d=8)}) == 2


def test_wrong_queries_leave_outputs_untouched(random):
    adapter = make_adapter(random)
    k, v = random.standard_normal((2, 100, HEADS_KV, D), dtype=np.float32)
    view = fs.KvView.token_major(k, v)
    sequence = adapter.create()
    adapter.append(sequence, view)
    asking = [fs.SequenceInput(sequence, view)]
    q = np.zeros((HEADS_Q, D), np.float32)
    output, lse = np.full((1, HEADS_Q, D), 7, np.float32), np.full((1, HEADS_Q), 7, np.float32)
    for wrong, sentence in ((q[:5], "queries has the shape (5, 16), expected (6, 16)"), (q * np.nan, "finite")):
        with pytest.raises(fs.Error, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            adapter.attend(asking, wrong, output=output, lse=lse)
    assert (output == 7).all() and (lse == 7).all()
    with pytest.raises(fs.Error, match="output must be a writable"):
        adapter.attend(asking, q, output=np.empty((1, HEADS_Q, D)))
    with pytest.raises(fs.Error, match="merge = True needs"):
        adapter.attend(asking, q, merge=True)
    with pytest.raises(fs.Error, match="kv is a tuple"):
        fs.SequenceInput(sequence, (k, v))


# --- threads, time, types


def test_other_threads_run_while_the_library_works(random):
    keys = random.standard_normal((40000, 64), dtype=np.float32)
    done = threading.Event()

    def work():
        fs.kmeans_partition(keys, 128)
        done.set()

    turns = 0
    thread = threading.Thread(target=work)
    start = time.perf_counter()
    thread.start()
    while not done.wait(0.001):
        turns += 1
    # with the lock held the wait would have returned once, at the end
    assert turns > 5, f"{turns} turns in {time.perf_counter() - start:.3f} s"
    thread.join()


def test_a_call_costs_little(random):
    """A call with hardly any work costs no more than the binding may: an upper bound of what Python adds."""
    adapter = fs.AttentionAdapter(1, 1, 8, [fs.kmeans_partition(random.standard_normal((64, 8)), 4)])
    k = np.ones((1, 1, 8), np.float32)
    view = fs.KvView.token_major(k, k)
    sequence = adapter.create()
    adapter.append(sequence, view)
    asking, q = [fs.SequenceInput(sequence, view)], np.ones((1, 1, 8), np.float32)
    times = []
    for _ in range(3000):
        start = time.perf_counter()
        adapter.attend(asking, q)
        times.append(time.perf_counter() - start)
    assert min(times) < 20e-6


def test_stubs_cover_the_package():
    folder = Path(fs.__file__).parent
    assert (folder / "py.typed").exists()
    tree = ast.parse((folder / "_core.pyi").read_text())
    declared = {n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    declared |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    public = {n for n in dir(fs) if not n.startswith("_")}
    assert {"AttentionAdapter", "IndexAsymmetricIVF", "read_partitions", "Error"} <= public
    assert public - declared == set()
    documented = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name != "Error"]
    assert [n.name for n in documented if not ast.get_docstring(n)] == []


def test_the_example_in_the_docs_runs(capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text()
    exec(compile(text.split("```python\n")[1].split("```")[0], "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(1, 6, 64) (1, 6) read ")
