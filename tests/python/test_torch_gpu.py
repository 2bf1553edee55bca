"""Tensors of torch on a CUDA device through GpuAttentionAdapter: against the adapter in main memory, on torch's
stream, in its graphs. Skipped where there is no device or the package was built without CUDA."""

import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import faiss_saap as fs  # noqa: E402

if not fs.has_cuda or not torch.cuda.is_available():
    pytest.skip("every test here needs a CUDA device, and a package built with CUDA", allow_module_level=True)

TOKENS, ROOM, HEADS_Q, HEADS_KV, D = 3000, 3100, 6, 2, 64
OPTIONS = dict(sink=16, window=128, policy=fs.ProbePolicy(nprobe=64, max_selectivity=0.1))


class World:
    """Keys and values (room, heads_kv, d) on the device, of which TOKENS are seen by adapters here and there."""

    def __init__(self, dtype=torch.float16, major="token"):
        generator = torch.Generator().manual_seed(5)
        self.k, self.v = (torch.randn(ROOM, HEADS_KV, D, generator=generator).to(dtype) for _ in range(2))
        self.q = torch.randn(ROOM, 1, HEADS_Q, D, generator=generator).to(dtype)
        keys = self.k[:TOKENS].float().transpose(0, 1)
        self.partitions = [fs.kmeans_partition(head.contiguous().numpy(), 40) for head in keys]
        self.host = fs.AttentionAdapter(HEADS_Q, HEADS_KV, D, self.partitions, **OPTIONS)
        self.host_view = fs.KvView.token_major(*(x.float() for x in (self.k, self.v)), TOKENS)
        self.host_sequence = self.host.create()
        self.host.append(self.host_sequence, self.host_view)

        self.adapter = fs.GpuAttentionAdapter(HEADS_Q, HEADS_KV, D, self.partitions, **OPTIONS)
        self.dk, self.dv = self.k.cuda(), self.v.cuda()
        self.view = self.view_of(major)
        self.sequence = self.adapter.create(reserve=ROOM)
        self.adapter.append(self.adapter.plan([fs.SequenceInput(self.sequence, self.view, TOKENS)]))
        self.batch = self.adapter.plan([fs.SequenceInput(self.sequence, self.view)])
        self.output = torch.empty(1, HEADS_Q, D, device="cuda")
        self.lse = torch.empty(1, HEADS_Q, device="cuda")
        self.stats = torch.empty(1, HEADS_Q, 4, dtype=torch.int64, device="cuda")

    def view_of(self, major):
        if major == "token":
            return fs.KvView.token_major(self.dk, self.dv)
        if major == "head":
            self.held = [x.transpose(0, 1).contiguous() for x in (self.dk, self.dv)]
            return fs.KvView.head_major(*self.held)
        if major == "strided":  # keys beside values, of one sequence of several
            self.held = torch.stack([torch.zeros_like(torch.stack([self.dk, self.dv], 2)),
                                     torch.stack([self.dk, self.dv], 2)], 1)  # fmt: skip
            return fs.KvView.token_major(self.held[:, 1, :, 0], self.held[:, 1, :, 1])
        table = torch.randperm(ROOM // 50).int().cuda()
        self.held = [torch.empty(ROOM // 50, 50, HEADS_KV, D, dtype=x.dtype, device="cuda") for x in (self.dk, self.dv)]
        for pages, x in zip(self.held, (self.dk, self.dv)):
            pages[table.long()] = x.unflatten(0, (-1, 50))
        return fs.KvView.paged(*self.held, table)

    def expected(self, token):
        self.host_view.length = token + 1
        self.host.append(self.host_sequence, self.host_view)
        return self.host.attend([fs.SequenceInput(self.host_sequence, self.host_view)], self.q[token].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("major", ["token", "head", "strided", "paged"])
def test_steps_are_those_of_the_adapter_in_main_memory(dtype, major):
    world = World(dtype, major)
    assert world.view.device == 0 and world.view.dtype == str(dtype).removeprefix("torch.")
    for token in range(TOKENS, TOKENS + 20):
        expected = world.expected(token)
        world.adapter.append(world.batch)
        world.adapter.attend(world.batch, world.q[token].cuda(), world.output, world.lse, world.stats)
        torch.testing.assert_close(world.output.cpu(), torch.from_numpy(expected.output), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(world.lse.cpu(), torch.from_numpy(expected.lse), atol=2e-3, rtol=0)
        np.testing.assert_array_equal(world.stats[..., 0].cpu(), expected.cells)
        np.testing.assert_array_equal(world.stats[..., 1].cpu(), expected.keys_read)
        np.testing.assert_array_equal(world.stats[..., 2].cpu(), expected.far_keys)
    assert world.adapter.length(world.sequence) == TOKENS + 20
    world.adapter.check()


def test_forks_truncations_and_a_policy_for_one_call():
    world = World()
    other = world.adapter.fork(world.sequence)
    both = world.adapter.plan([fs.SequenceInput(s, world.view) for s in (world.sequence, other)])
    q = world.q[TOKENS].repeat(2, 1, 1).cuda()
    output, everything = torch.empty(2, HEADS_Q, D, device="cuda"), torch.empty(2, HEADS_Q, D, device="cuda")
    world.adapter.append(both)
    world.adapter.attend(both, q, output)
    assert torch.equal(output[0], output[1])
    world.adapter.attend(both, q, everything, policy=fs.ProbePolicy(nprobe=64))
    k, v = (x[: TOKENS + 1].repeat_interleave(3, 1).transpose(0, 1).float() for x in (world.dk, world.dv))
    dense = torch.nn.functional.scaled_dot_product_attention(q[0][:, None].float(), k, v)[:, 0]
    torch.testing.assert_close(everything[1], dense, atol=2e-3, rtol=2e-3)
    world.adapter.truncate(other, TOKENS - 500, world.view)
    assert world.adapter.length(other) == TOKENS - 500 and world.adapter.length(world.sequence) == TOKENS + 1
    world.adapter.free(other)
    with pytest.raises(fs.Error, match="was freed"):
        world.adapter.length(other)


def test_torchs_current_stream_is_respected():
    world = World()
    expected = world.expected(TOKENS)
    q = torch.zeros(1, HEADS_Q, D, dtype=torch.float16, device="cuda")
    right = world.q[TOKENS].cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second, in which the default stream would run ahead
        q.copy_(right)
        world.adapter.append(world.batch)
        world.adapter.attend(world.batch, q, world.output)
        result = world.output.clone()
    assert not stream.query()  # nothing has waited
    stream.synchronize()
    torch.testing.assert_close(result.cpu(), torch.from_numpy(expected.output), atol=2e-3, rtol=2e-3)
    # named outright, too
    for named in (stream, stream.cuda_stream):
        world.adapter.attend(world.batch, q, world.output, stream=named)
    stream.synchronize()
    assert torch.equal(world.output, result)


def test_a_step_is_captured_in_a_graph():
    world = World()
    q = world.q[TOKENS].cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        world.adapter.append(world.batch)
        world.adapter.attend(world.batch, q, world.output)
    for token in range(TOKENS, TOKENS + 5):
        expected = world.expected(token)
        q.copy_(world.q[token])
        graph.replay()
        torch.testing.assert_close(world.output.cpu(), torch.from_numpy(expected.output), atol=2e-3, rtol=2e-3)
    assert world.adapter.length(world.sequence) == TOKENS + 5


def test_cells_learnt_on_the_device_are_as_good():
    generator = torch.Generator().manual_seed(3)
    # without clusters, which one start of k-means would find and another miss
    x = (torch.randn(4000, 3, D, generator=generator) * torch.linspace(0.5, 4, D)).half()
    ours = fs.gpu_sequence_partitions(fs.KvView.token_major(x.cuda(), x.cuda()), 16, 3900, 60)
    theirs = fs.sequence_partitions(fs.KvView.token_major(x, x), 16, 3900, 60)
    keys = x[16:3900].float()
    for head, ((partition,), (other,)) in enumerate(zip(ours, theirs, strict=True)):
        distances = [torch.cdist(keys[:, head], torch.from_numpy(p.key.centroids)) for p in (partition, other)]
        spread = [d.amin(1).square().sum() for d in distances]
        assert partition.ncell == 60 and spread[0] < 1.05 * spread[1]
        cells = distances[0].argmin(1)
        for cell in range(0, 60, 7):
            mean = keys[cells == cell, head].mean(0)
            torch.testing.assert_close(torch.from_numpy(partition.query.centroids)[cell], mean, atol=5e-3, rtol=0)


def test_the_example_in_the_docs_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text()
    example = next(block for block in text.split("```python\n") if block.startswith("import torch")).split("```")[0]
    names = {}
    exec(compile(example, "docs/python.md", "exec"), names)
    assert names["adapter"].length(names["sequence"]) == 4010 and torch.isfinite(names["output"]).all()


def test_what_cannot_be_is_refused_with_a_sentence():
    world = World()
    q = world.q[0].cuda()
    asking = [fs.SequenceInput(world.host_sequence, world.view)]
    whole = fs.KvView.token_major(world.dk.float(), world.dv.float())
    step = lambda *a, **k: world.adapter.attend(world.batch, *a, **k)
    for wrong, sentence in [
        (lambda: world.host.append(world.host_sequence, world.view), "kv lies on CUDA device 0"),
        (lambda: world.host.attend(asking, world.q[0].float()), "kv lies on CUDA device 0"),
        (lambda: fs.attend_dense(world.view, world.q[0][0].float()), "kv lies on CUDA device 0"),
        (lambda: world.adapter.plan([fs.SequenceInput(0, world.host_view)]), "kv lies in main memory"),
        (lambda: world.adapter.plan([fs.SequenceInput(0, whole)]), "there are float16 and bfloat16"),
        (lambda: fs.KvView.token_major(world.dk, world.v), "v must lie where k does"),
        (lambda: step(q.cpu(), world.output), "queries must be contiguous float16"),
        (lambda: step(q.float(), world.output), "queries must be contiguous float16"),
        (lambda: step(q[:, :3], world.output), "queries has the shape"),
        (lambda: step(q, world.output.cpu()), "output must be a writable"),
        (lambda: step(q, world.output.half()), "output must be a writable"),
        (lambda: step(q, world.output, stats=world.lse), "stats must be a writable, contiguous array of int64"),
        (lambda: step(q, world.output, stream="main"), "stream is a str"),
        (lambda: fs.AttentionAdapter(2, 1, 64, world.partitions[:1]).attend([], q), "queries"),
        (lambda: fs.gpu_sequence_partitions(world.host_view, 0, 100, 2), "kv lies in main memory"),
        (lambda: fs.gpu_sequence_partitions(world.view, 0, 9, 10), "ncell = 10"),
        (lambda: fs.sequence_partitions(world.view, 0, 100, 2), "kv lies on CUDA device 0"),
    ]:
        with pytest.raises(fs.Error, match=sentence):
            wrong()


def test_a_call_costs_little(capsys):
    """What a step costs on the host, kernels' launches included."""
    world = World()
    q, stream = world.q[0].cuda(), torch.cuda.current_stream().cuda_stream
    best = {}
    for name, call in {
        "attend": lambda: world.adapter.attend(world.batch, q, world.output),
        "attend with stream=": lambda: world.adapter.attend(world.batch, q, world.output, stream=stream),
    }.items():
        times = []
        for i in range(2000):
            if i % 20 == 0:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        best[name] = 1e6 * np.median(times)
    with capsys.disabled():
        print(" " + ", ".join(f"{name}: {us:.1f} µs" for name, us in best.items()), end="")
    assert best["attend"] < 100
