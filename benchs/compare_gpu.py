"""Times a decode step's attention of one layer on a GPU: torch's dense kernels and the adapter.

Torch's are FlashAttention-2, cuDNN and FlexAttention, each with the heads of a group as query
tokens and as heads, whichever is faster; one that does not run is left out, with its reason.

All methods run in one process on the same tensors. A CUDA graph holds a step of several
layers, each with caches of its own, so many that the L2 cache does not help; the adapter has
more layers, which share caches, so that neither its weights nor its lists stay there. Times are
those of the graph divided by its layers. Keys lie around the centres of 1,024 cells per KV head
whose sizes are log-normal (sigma 0.5), as skewed as those of real partitions.

    python benchs/compare_gpu.py --library build/lib/libfaiss_saap_c.so --json gpu.json --plot gpu.png
    python benchs/compare_gpu.py --from gpu.json --plot gpu.png    # the plot alone
"""

import argparse
import ctypes
import functools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "contrib"))

HEADS_Q, HEADS_KV, D, NCELL = 32, 8, 128, 1024  # Llama-3.1-8B
SINK, WINDOW = 16, 1024
ROTATION = 256 << 20  # bytes of keys and values that a round of all layers reads at least
WEIGHTS = 128 << 20  # and of weights, counts and where lists begin
OF_CELL = 4 + 32  # bytes: its count, and the sector where its extents begin
WARM_UP = 20  # replays before those that are timed: by then steps find cells ahead, as in a longer text
MOST_ERROR = 1e-2  # of dense attention, relative


def measure(torch, run, layers, repeat):
    """Microseconds per layer: median and 99th percentile of the replays of one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(layers):
            run(layer, stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for layer in range(layers):
            run(layer, stream)
    times = []
    with torch.cuda.stream(stream):
        for r in range(-WARM_UP, repeat):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if r >= 0:
                times.append(1e3 * begin.elapsed_time(end) / layers)
    times.sort()
    return {"us": statistics.median(times), "p99_us": times[math.ceil(0.99 * len(times)) - 1]}


def caches(torch, tokens, room, sequences, centres, generator):
    """Keys and values of one layer, a pair of tensors for each sequence."""
    weights = torch.exp(0.5 * torch.randn(HEADS_KV, NCELL, device="cuda", generator=generator))
    keys, values = [], []
    for _ in range(sequences):
        k = torch.zeros(room, HEADS_KV, D, device="cuda", dtype=torch.bfloat16)
        for h in range(HEADS_KV):
            cell = torch.multinomial(weights[h], tokens, replacement=True, generator=generator)
            noise = torch.randn(tokens, D, device="cuda", generator=generator)
            k[:tokens, h] = (centres[h][cell] + 0.5 * noise).bfloat16()
        v = torch.randn(room, HEADS_KV, D, device="cuda", generator=generator).bfloat16()
        keys.append(k)
        values.append(v)
    return keys, values


def methods_of_torch(torch):
    """Its dense attention by name: of queries (sequences, heads, tokens, d), keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    def sdpa(backend):
        def attend(q, k, v, **gqa):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **gqa)

        return attend

    torch._dynamo.reset()  # else it compiles for eight shapes and then no more
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @functools.cache
    def all_blocks(queries, tokens, device):
        return create_block_mask(noop_mask, None, None, queries, tokens, device=device)

    def flex(q, k, v, **gqa):  # without a mask, a row's keys are one block, which one processor reads
        return compiled(q, k, v, block_mask=all_blocks(q.shape[2], k.shape[2], q.device), **gqa)

    return {
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex": flex,
    }


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def compare(torch, library, tokens, sequences, selectivities, repeat):
    from c_api import Adapter, Params

    generator = torch.Generator("cuda").manual_seed(tokens + sequences)
    row = 2 * 2 * D * HEADS_KV * sequences
    step = row * (SINK + WINDOW + min(selectivities) * tokens)
    cache = row * tokens
    fit = int(0.6 * torch.cuda.mem_get_info()[0] / cache)
    layers = max(2, min(math.ceil(ROTATION / step), fit))
    beside = HEADS_KV * NCELL * (2 * D + OF_CELL * sequences)
    adapter_layers = layers * max(1, math.ceil(WEIGHTS / beside / layers))  # the first follow the last
    room = tokens + 8 * (repeat + 8)
    centres = torch.randn(HEADS_KV, NCELL, D, device="cuda", generator=generator)
    centres = centres.bfloat16().float()  # as training rounds them
    data = [caches(torch, tokens, room, sequences, centres, generator) for _ in range(layers)]
    q = torch.randn(sequences, HEADS_Q, D, device="cuda", generator=generator).bfloat16()
    # In one sequence length for all, so that torch needs no nested tensors.
    stacked = [
        [torch.stack([x[:tokens] for x in side]) if sequences > 1 else side[0][None, :tokens] for side in layer]
        for layer in data
    ]
    results = {}

    def by_torch(attend, grouped):
        def run(layer, stream):
            k, v = (x.transpose(1, 2) for x in stacked[layer])
            if grouped:  # the heads of a group as tokens: keys are read once
                return attend(q.view(sequences, HEADS_KV, -1, D), k, v)
            return attend(q[:, :, None], k, v, enable_gqa=True)

        return run

    dense = methods_of_torch(torch)
    expected = by_torch(dense["flash"], True)(0, None).reshape(sequences, HEADS_Q, D).float()
    for name, attend in dense.items():
        for grouped in (True, False):
            try:
                run = by_torch(attend, grouped)
                apart = relative_error(run(0, None).reshape(sequences, HEADS_Q, D), expected)
                if not apart < MOST_ERROR:
                    raise RuntimeError(f"differs from FlashAttention-2 by {apart:.1e}")
                got = measure(torch, run, layers, repeat)
            except RuntimeError as reason:  # not for this device, these shapes or this torch
                print(f"{name}, {'grouped' if grouped else 'GQA'}: {str(reason).splitlines()[0]}", file=sys.stderr)
                torch.cuda.synchronize()
                continue
            if name not in results or got["us"] < results[name]["us"]:
                results[name] = got

    output = torch.empty(sequences, HEADS_Q, D, device="cuda")
    host_centres = centres.cpu()

    def ours(window, selectivity, layers):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        params = Params(HEADS_Q, HEADS_KV, D, NCELL, 0, 1, SINK, window, 0, NCELL, selectivity, 0)
        adapters, batches = [], []
        for layer in range(layers):
            keys, values = data[layer % len(data)]
            adapter = Adapter(library, params, host_centres)
            all_sequences = [adapter.create(room, stream) for _ in range(sequences)]
            adapter.append(adapter.plan(all_sequences, tokens, keys, values, stream), stream)
            batches.append(adapter.plan(all_sequences, 1, keys, values, stream))
            adapters.append(adapter)
        torch.cuda.synchronize()

        def attend(layer, stream):
            adapters[layer].attend(batches[layer], q, output, ctypes.c_void_p(stream.cuda_stream))

        def step(layer, stream):
            adapters[layer].step(batches[layer], q, output, ctypes.c_void_p(stream.cuda_stream))

        return adapters, attend, step

    adapters, attend, _ = ours(room, 1.0, layers)
    attend(0, torch.cuda.current_stream())
    torch.cuda.synchronize()
    error = relative_error(output, expected)
    if not error < MOST_ERROR:
        sys.exit(f"error: dense attention differs from torch's by {error:.1e}")
    results["dense"] = measure(torch, attend, layers, repeat)
    for adapter in adapters:
        adapter.close()
    for selectivity in selectivities:
        adapters, attend, step = ours(WINDOW, selectivity, adapter_layers)
        results[f"saap {selectivity:g}"] = measure(torch, attend, adapter_layers, repeat)
        results[f"saap {selectivity:g} + append"] = measure(torch, step, adapter_layers, repeat)
        for adapter in adapters:
            adapter.check()
            adapter.close()
    return {"tokens": tokens, "sequences": sequences, "layers": layers, "adapter_layers": adapter_layers, "dense_error": error, "methods": results}


def machine(torch):
    """The device and its state, the clock as it is under load."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(500):
        x @ x
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader", "-i", "0"]
    name, driver, sm, most, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return {"device": name, "driver": driver, "sm_clock": sm, "most_sm_clock": most, "memory_clock": memory, "torch": torch.__version__, "cuda": torch.version.cuda}


def show(report):
    print(", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    for result in report["results"]:
        flash = result["methods"].get("flash", {}).get("us", math.nan)
        print(f"{result['sequences']} x {result['tokens']} tokens, {result['layers']} layers in turn, {result.get('adapter_layers', result['layers'])} of the adapter; dense differs from flash by {result['dense_error']:.1e}")
        for name, m in result["methods"].items():
            print(f"  {name:20} {m['us']:8.1f} us  p99 {m['p99_us']:8.1f}  {flash / m['us']:6.2f} x flash")


def plot(report, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    single = [r for r in report["results"] if r["sequences"] == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    names = [n for n in single[0]["methods"] if not n.startswith("saap") or "append" in n]
    for name in names:
        points = [(r["tokens"], r["methods"][name]["us"]) for r in single if name in r["methods"]]
        left.plot(*zip(*points), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs per layer", title="one sequence")
    tokens = [r["tokens"] for r in single]
    ticks = [20, 50, 100, 200, 500, 1000]
    left.set_xticks(tokens, [f"{t // 1024}k" for t in tokens])
    left.set_yticks(ticks, [str(t) for t in ticks])
    left.minorticks_off()
    left.set_ylim(top=4 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize="small", ncols=2, loc="upper left")
    for r in report["results"]:
        points = [
            (float(n.split()[1]), r["methods"]["flash"]["us"] / m["us"])
            for n, m in r["methods"].items()
            if n.endswith("append") and "flash" in r["methods"]
        ]
        right.plot(*zip(*points), marker="o", label=f"{r['sequences']} × {r['tokens']:,}")
    right.set(xscale="log", xlabel="share of the far keys read", ylabel="times as fast as FlashAttention-2", title=report["machine"]["device"])
    shares = sorted({x for line in right.get_lines() for x in line.get_xdata()})
    right.set_xticks(shares, [f"{100 * x:g} %" for x in shares])
    right.minorticks_off()
    right.axhline(1, color="grey", linewidth=0.5)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libfaiss_saap_c.so of a CUDA build")
    parser.add_argument("--shapes", nargs="+", default=["1x32768", "1x131072", "1x262144", "1x524288", "8x131072"], help="sequences x tokens")
    parser.add_argument("--selectivity", nargs="+", type=float, default=[0.01, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--repeat", type=int, default=60, help="replays of each graph")
    parser.add_argument("--commit", default="", help="what was built, for the report")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="file for the plot")
    parser.add_argument("--from", dest="source", help="results to show instead of measuring")
    args = parser.parse_args()
    if args.source:
        report = json.loads(Path(args.source).read_text())
    else:
        import torch
        from c_api import load

        if not args.library:
            parser.error("--library or --from is needed")
        if not torch.cuda.is_available():
            sys.exit("error: torch sees no CUDA device")
        library = load(args.library)
        report = {"machine": machine(torch), "commit": args.commit, "results": []}
        for shape in args.shapes:
            sequences, tokens = (int(x) for x in shape.split("x"))
            print(f"measuring {shape}", file=sys.stderr)
            report["results"].append(compare(torch, library, tokens, sequences, args.selectivity, args.repeat))
            torch.cuda.empty_cache()
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
