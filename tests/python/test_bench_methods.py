"""The benchmark of methods: what it runs, that it goes on where it was, and what its report says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
sys.path.insert(0, str(CONTRIB))
import bench_methods  # noqa: E402
import bench_report  # noqa: E402
from trace_file import Trace, write_trace  # noqa: E402

RECALL = {"mine": 0.4, "oracle_topk_group": 0.9, "metric_codes_group": 0.8, "quest_64_group": 0.5, "streaming_llm": 0.2}

# Stands for bench_recall, bench_ann and generate_trace: notes that it was called and answers as they do.
STUB = """#!{python}
import json, pathlib, sys
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    print(pathlib.Path(sys.argv[0]).name, file=log)
if "--out" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text("")
    sys.exit()
rows = [
    dict(method=m, budget=b, query_head=h, bytes_fraction=b + 0.01, mass_recall=r * (b / 0.2) ** 0.1, output_error=1 - r,
         us_per_query=5.0, selectivity=b, parameters="n=1", recall=r)
    for m, r in {recall!r}.items() if m in o.get("--methods", m).split(",") for b in (0.01, 0.04, 0.2) for h in (0, 1)
]
heads = [dict(keys_for_95=[i / 20 for i in range(21)]) for h in (0, 1)]
front = [dict(key="IVF n=1", recall=0.5, us_per_query=5.0)]
json.dump(dict(rows=rows, heads=heads, config=dict(k=10), pareto=front, environment=dict(cores=2, processor="a processor")), open(o["--json"], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    for name in ("bin", "traces/heads", "data"):
        (root / name).mkdir(parents=True)
    stub = STUB.format(python=sys.executable, log=str(root / "log"), recall=RECALL)
    for program in ("bench_recall", "bench_ann", "generate_trace"):
        (root / "bin" / program).write_text(stub)
        (root / "bin" / program).chmod(0o755)
    texts_of = {"8k": ["kjv", "python", *bench_methods.TEXTS["8k"]], "32k": ["kjv", *bench_methods.TEXTS["32k"]]}
    for length, texts in texts_of.items():
        for text in texts:
            x = {layer: np.zeros((3, 4, 2), np.float16) for layer in (1, 5, 9, 13, 17, 21, 25, 29)}
            trace = Trace("m", text, np.zeros(4, np.int32), 1e4, q=x, k=x, v=x)
            write_trace(root / "traces" / "heads" / f"{text}_{length}.safetensors", trace)
    return root


def bench(folder, *more):
    before = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    done = subprocess.run(
        [sys.executable, CONTRIB / "bench_methods.py", "--traces", folder / "traces", "--bin", folder / "bin",
         "--data", folder / "data", "--cache", folder / "cache", *more],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()[len(before) :]


def test_a_run_that_fails_is_named(folder, tmp_path):
    (tmp_path / "bench_recall").write_text("#!/bin/sh\necho 'the text is too short' >&2\nexit 1\n")
    (tmp_path / "bench_recall").chmod(0o755)
    done = subprocess.run(
        [sys.executable, CONTRIB / "bench_methods.py", "--traces", folder / "traces", "--bin", tmp_path,
         "--data", folder / "data", "--cache", tmp_path / "cache"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and re.search(r"error: 8k-\w+-\d+-\d: the text is too short", done.stderr)
    assert "Traceback" not in done.stderr


def test_only_what_is_missing_runs(folder):
    calls = bench(folder)
    made = sorted(p.name for p in (folder / "cache").iterdir())
    assert len(calls) == len(made) and any("prefix" in name for name in made)
    (folder / "cache" / made[3]).unlink()
    assert bench(folder) == ["bench_recall"]
    assert bench(folder) == []
    # a method that is asked for is measured anew
    assert bench(folder, "--with", "mine") == bench(folder, "--with", "mine") == ["bench_recall"] * 32
    full = bench(folder, "--full")
    generated = [p for p in (folder / "cache").iterdir() if "generated" in p.name]
    assert full.count("generate_trace") == len(generated) > 0
    assert bench(folder, "--full") == []


def test_no_text_that_methods_were_developed_on(folder):
    runs = bench_methods.plan(folder / "traces", folder / "data", ["8k", "32k"])
    assert not {"kjv", "python"} & {run.name.split("-")[1] for run in runs}
    # and the heads of generated texts are those of recorded ones
    of = lambda text: {(r.layer, r.kv_head) for r in runs if (r.length == "32k") and (("generated" in r.name) == text)}
    assert of(True) == of(False)
    # of 32,768 tokens every text has the same heads
    by_text = {t: {(r.layer, r.kv_head) for r in runs if r.name.startswith(f"32k-{t}-")} for t in bench_methods.TEXTS["32k"]}
    assert len(by_text) == 4 and all(heads == of(False) for heads in by_text.values())


def test_what_is_left_out_is_said(folder, tmp_path):
    plan = lambda *lengths: bench_methods.plan(folder / "traces", tmp_path, lengths)
    short, full = bench_methods.left_out(plan("8k"), False), bench_methods.left_out(plan("8k", "32k"), True)
    assert [bool(re.search("32,768.*--full", s)) for s in short] == [True, False]
    assert [s[:11] for s in full] == ["saap at 8k ", "saap at 32k"] and short[1] == full[0]
    # a file that holds one of the heads is asked about this one
    tensors = json.dumps({"layer.9.kv.2.centroids": {}}).encode()
    (tmp_path / "smollm2_135m.saap").write_bytes(len(tensors).to_bytes(8, "little") + tensors)
    asked = {run.name for run in plan("8k") if run.partitions}
    assert asked == {"8k-handbook-9-2-trained", "8k-handbook-9-2-prefix-trained"}
    assert len(bench_methods.left_out(plan("8k"), False)) == 1


def test_report(folder, tmp_path):
    bench(folder, "--full")
    done = subprocess.run(
        [sys.executable, CONTRIB / "bench_report.py", folder / "cache", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["settings"]) == [
        "8k all", "8k prefix", "32k all", "32k generated all", "32k prefix", "128k generated all",
    ]  # fmt: skip
    assert {"mine", "streaming_llm"} <= results["settings"]["8k all"]["methods"].keys()
    entry = results["settings"]["32k all"]
    # halfway between the budgets of 1 and 4 % lies 3.5 % of the bytes
    at = bench_report.at_share(entry["methods"]["quest_64_group"]["curve"], 0.035, 1)
    assert at == pytest.approx(0.5 * (0.05**0.1 + 0.2**0.1) / 2, abs=1e-4)
    assert re.search("metric_codes_group has 0.88 of oracle_topk_group's recall.*32 of 32 KV heads", bench_report.verdict(entry))
    assert [text["text"] for text in entry["texts"]] == sorted(bench_methods.TEXTS["32k"])
    for text in entry["texts"]:
        assert text["heads"] == 8 and text["ours"][0] == "metric_codes_group" and text["baseline"][0] == "quest_64_group"
        assert text["ours"][1][0] == pytest.approx(0.8 * 0.2**0.1, abs=1e-3)  # the index is 1 %
    assert results["agreement"]["of_recorded"] == {"the same head in two texts": 1, "different heads": 1}
    assert results["agreement"]["of_means"] == 1 and set(results["agreement"]["of_heads"].values()) == {1}
    page = (tmp_path / "index.html").read_text()
    assert "/*DATA*/" not in page and "http" not in page.replace("http-equiv", "")
    assert list(results["search"]) == [f"8k {t} {l}.{h}" for t, l, h in bench_methods.SEARCHED["8k"]]
    for name in ("curves-8k-all", "heads-8k-all", "keys-8k-all", "curves-128k-generated-all"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_ranks_share_ties():
    assert list(bench_report.ranks([0.3, 0.1, 0.3, 0.9, 0.0])) == [2.5, 1, 2.5, 4, 0]
