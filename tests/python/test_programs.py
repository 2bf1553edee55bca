"""What every program in build/bin promises: --help, no unknown options, one sentence for wrong input, JSON."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
BIN = os.environ.get("FAISS_SAAP_BIN")
TRACE = os.environ.get("FAISS_SAAP_TRACE")
if not BIN or not TRACE:
    pytest.skip("FAISS_SAAP_BIN and FAISS_SAAP_TRACE are not set", allow_module_level=True)

NAMES = ("demo", "bench_", "choose_", "generate_", "train_")
PROGRAMS = sorted(p for p in Path(BIN).iterdir() if p.name.startswith(NAMES))


def run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)


def test_there_are_programs():
    expected = {
        "demo", "bench_adapter", "bench_build", "bench_classifier", "bench_decode", "bench_recall", "bench_search",
        "choose_partitions", "generate_trace", "train_partitions",
    }
    assert expected <= {p.name for p in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_help(program):
    result = run(program, "--help")
    assert result.returncode == 0 and "--json" in result.stdout


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_unknown_option(program):
    result = run(program, "--no-such-option", "1")
    assert result.returncode != 0 and result.stderr


def test_bench_search_writes_json(tmp_path):
    out = tmp_path / "r.json"
    result = run(Path(BIN) / "bench_search", "--n", 2000, "--ncell", 16, "--queries", 20, "--repeat", 3, "--json", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert set(report) == {"config", "environment", "rows"}
    assert all(row["ratio"] > 0 for row in report["rows"])


def test_bench_classifier_writes_json(tmp_path):
    out = tmp_path / "r.json"
    options = ["--ncell", 64, "--width", 32, "--queries", 100, "--batch", 20, "--cold-gib", 0.01]
    result = run(Path(BIN) / "bench_classifier", *options, "--json", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert [row["stage"] for row in report["rows"]] == ["warm", "cold", "batch"]
    assert all(row["us"] > 0 for row in report["rows"])
    result = run(Path(BIN) / "bench_classifier", "--cold-gib", "4e18")
    assert result.returncode != 0 and "--cold-gib: Value 4e18 not in range" in result.stderr
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**40:
        result = run(Path(BIN) / "bench_classifier", "--cold-gib", 1024)
        assert "weights of 1024 GiB do not fit" in result.stderr


def test_bench_decode_writes_json(tmp_path):
    out = tmp_path / "r.json"
    options = ["--tokens", 2048, "--window", 64, "--ncell", 32, "--buffers", 0.01, "--repeat", 3, "--sequences", 2]
    result = run(Path(BIN) / "bench_decode", *options, "--json", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    rows = {row["stage"]: row for row in report["rows"]}
    assert set(rows) == {"bandwidth", "gather", "dense", "sparse", "sparse_codes", "route", "route_classifier", "attend", "append"}
    assert all(row["us"] > 0 and row["p99_us"] >= row["us"] for row in rows.values())
    # What is read: keys and values of 8 heads, 2 sequences, bfloat16.
    assert rows["dense"]["bytes"] == 2 * 2048 * 8 * 2 * 128 * 2
    assert report["config"]["selectivity"] <= 0.05
    assert rows["gather"]["bytes"] == rows["attend"]["bytes"] < 0.12 * rows["dense"]["bytes"]


def test_bench_build_writes_json(tmp_path):
    out = tmp_path / "r.json"
    options = ["--tokens", 2048, "--inserts", 200, "--window", 64, "--ncell", 32, "--heads-kv", 2, "--head-dim", 32]
    result = run(Path(BIN) / "bench_build", *options, "--json", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert [row["stage"] for row in report["rows"]] == ["cluster", "assign", "lists", "insert"]
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in report["rows"])
    # 6 bytes for each of the slots listed, blocks and statistics of cells on top.
    listed = 2 * (2048 + 200 - 64 - 16)
    assert 6 * listed < report["config"]["index_bytes"] < 6 * listed + 400_000
    result = run(Path(BIN) / "bench_build", "--tokens", 20, "--ncell", 32)
    assert result.returncode == 1 and "fewer" in result.stderr


def test_bench_adapter_measures_while_the_sequence_grows(tmp_path):
    out = tmp_path / "r.json"
    options = ["--trace", TRACE, "--layer", 9, "--budget", 0.05, "--queries", 8]
    result = run(Path(BIN) / "bench_adapter", *options, "--json", out)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert sorted({row["tokens"] for row in rows}) == [2048, 4096, 6144, 8192]
    assert len(rows) == 4 * 2 * 3  # lengths, partitions, choices
    pairs = {}
    for row in rows:
        assert 0 < row["mass_recall"] <= 1 and 0 < row["output_error"] < 1
        if row["partitions"] == "de-rotated, means":  # cells of rotated keys outgrow the budget
            assert 0 < row["selectivity"] <= 0.0501
        pairs.setdefault((row["tokens"], row["partitions"]), {})[row["choice"]] = row["selectivity"]
    result = run(Path(BIN) / "bench_adapter", *options, "--window", 1792)
    assert result.returncode == 1 and "window = 1792 leave no far keys to token 1792" in result.stderr
    for choices in pairs.values():  # compared at equal selectivity per KV head
        assert abs(choices["group"] - choices["query head"]) < 0.005


def test_demo_on_wrong_input(tmp_path):
    result = run(Path(BIN) / "demo", "--trace", tmp_path / "absent")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = run(Path(BIN) / "demo", "--trace", TRACE, "--json", tmp_path / "demo.json", "--ncell", 8192)
    assert result.returncode == 1 and "ncell = 8192" in result.stderr
    assert not list(tmp_path.iterdir())
    result = run(Path(BIN) / "demo", "--trace", TRACE, "--window", 7168)
    assert result.returncode == 1 and "window = 7168 leave no far keys to token 7168" in result.stderr


def test_what_cannot_be_measured_is_refused(tmp_path):
    small = ["--tokens", 4096, "--heads-q", 4, "--heads-kv", 2, "--ncell", 8, "--repeat", 1, "--buffers", 0.01]
    recall = ["--trace", TRACE, "--layer", 9, "--methods", "streaming_llm", "--queries", 2]
    out = tmp_path / "out.json"
    for program, options, code, sentence in (
        ("bench_decode", [*small, "--window", 4080], 1, "sink = 16 and window = 4080 leave no far keys to token 4095"),
        ("bench_decode", [*small, "--sink", 9999999], 1, "sink = 9999999"),
        ("bench_decode", [*small[:-1], 1e10], 1, "buffers = 1e+10"),
        ("bench_decode", ["--ncell", 65537], 105, "--ncell"),
        ("bench_recall", [*recall, "--window", 8200], 1, "window = 8200 leave no far keys"),
        ("bench_ann", ["--base", "b.fbin", "--query", "q.fbin", "--kv-head", 1], 108, "--base"),
    ):
        result = run(Path(BIN) / program, *options, "--json", out)
        assert result.returncode == code and sentence in result.stderr, (program, options, result.stderr)
        assert not out.exists()


def test_memory_that_is_not_there_is_said(tmp_path):
    program, out = Path(BIN) / "bench_search", tmp_path / "out.json"
    if b"__asan_init" in program.read_bytes():
        pytest.skip("the address sanitizer ends the program itself")
    result = run(program, "--n", 10**13, "--queries", 1, "--json", out)
    assert result.returncode == 1 and result.stderr.startswith("error: out of memory") and not out.exists()


def test_a_table_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        options = ["--n", 500, "--ncell", 4, "--queries", 4, "--repeat", 1]
        done = subprocess.run([Path(BIN) / "bench_search", *map(str, options)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "error: " in done.stderr


def test_results_do_not_take_the_place_of_other_files(tmp_path, monkeypatch):
    real, trace = tmp_path / "real.safetensors", tmp_path / "trace.safetensors"
    shutil.copy(TRACE, real)
    trace.symlink_to(real)
    monkeypatch.chdir(tmp_path)
    for program, options, named in (
        ("demo", ["--trace", trace, "--json", tmp_path / "." / "trace.safetensors"], "--json"),
        ("bench_recall", ["--trace", trace, "--layer", 9, "--save-cells", real], "--save-cells"),
        ("bench_adapter", ["--trace", trace, "--layer", 9, "--json", "trace.safetensors"], "--json"),
        ("generate_trace", ["--trace", trace, "--layer", 9, "--out", "a", "--json", "./a"], "--out"),
        ("generate_trace", ["--trace", trace, "--layer", 9, "--out", ""], "--out"),
        ("generate_trace", ["--trace", trace, "--layer", 9, "--out", tmp_path / "a", "--json", tmp_path / "a"], "--out"),
        ("generate_trace", ["--trace", trace, "--layer", 9, "--out", tmp_path / "no" / "a"], "--out"),
        ("train_partitions", ["--trace", trace, "--layers", 9, "--out", tmp_path], "--out"),
    ):
        result = run(Path(BIN) / program, *options)
        assert result.returncode == 1 and result.stderr.startswith(f"error: {named}"), result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [real, trace] and trace.is_symlink()
    assert real.read_bytes() == Path(TRACE).read_bytes()


def test_links_and_pipes_stay_what_they_are(tmp_path):
    options = ["--n", 500, "--ncell", 4, "--queries", 4, "--repeat", 1]
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    assert run(Path(BIN) / "bench_search", *options, "--json", link).returncode == 0
    assert link.is_symlink() and json.loads(target.read_text())["rows"]
    later = tmp_path / "later.json"
    link.unlink()
    link.symlink_to("later.json")  # which is not there yet
    assert run(Path(BIN) / "bench_search", *options, "--json", link).returncode == 0
    assert link.is_symlink() and json.loads(later.read_text())["rows"]
    with (tmp_path / "table").open("w") as table:
        subprocess.run([Path(BIN) / "bench_search", *map(str, options), "--json", "/dev/stdout"], stdout=table, check=True)
    assert "ratio" in (tmp_path / "table").read_text() and '"rows"' in (tmp_path / "table").read_text()
    done = run(Path(BIN) / "bench_search", *options, "--json", "/dev/stderr")
    assert done.returncode == 0 and json.loads(done.stderr)["rows"]


def test_numbers_must_be_numbers_and_lists_have_no_value_twice(tmp_path):
    out, recall = tmp_path / "out", ["--trace", TRACE, "--layer", 9]
    for program, options, sentence in (
        ("bench_recall", [*recall, "--budget", "nan"], "--budget: nan must be a finite number"),
        ("bench_recall", [*recall, "--budget", ".05,0.050"], "--budget has 0.050 more than once"),
        ("bench_recall", [*recall, "--methods", "saap,streaming_llm,saap"], "--methods has saap more than once"),
        ("bench_recall", [*recall, "--window", "9223372036854775808"], "--window: 9223372036854775808 is beyond 64 bits"),
        ("bench_recall", [*recall, "--json", ""], "--json: '' is not the name of a file"),
        ("bench_recall", [*recall, "--partitions", ""], "--partitions: '' is not the name of a file"),
        ("bench_adapter", ["--trace", TRACE, "--layer", "9,15,9"], "--layer has 9 more than once"),
        ("generate_trace", ["--trace", TRACE, "--layer", "9,9", "--out", out], "--layer has 9 more than once"),
        ("generate_trace", ["--trace", TRACE, "--layer", 9, "--out", out, "--rope-scaling", "cubic:2"], "'cubic:2'"),
        ("generate_trace", ["--trace", TRACE, "--layer", 9, "--out", out, "--seed", 2**64], f"--seed: {2**64} is beyond"),
        ("train_partitions", ["--trace", TRACE, "--layers", "9,9", "--out", out], "--layers has 9 more than once"),
    ):
        result = run(Path(BIN) / program, *options)
        assert result.returncode == 1 and sentence in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_tables_and_pictures_name_what_they_cannot_show(tmp_path):
    pytest.importorskip("matplotlib")
    report, absent, empty, text, picture = (tmp_path / name for name in ("r.json", "a.json", "e.json", "t", "p.png"))
    done = run(
        Path(BIN) / "bench_recall", "--trace", TRACE, "--layer", 9, "--methods", "streaming_llm", "--queries", 2,
        "--budget", 0.05, "--json", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    empty.write_text("{}")
    text.write_bytes(b"no JSON \xff")
    for program, options in (
        ("recall_table.py", []), ("plot_recall.py", [picture]), ("adapter_table.py", []),
        ("plot_classifier.py", ["--heads", "9:0", "--out", picture]),
    ):  # fmt: skip
        for file, sentence in ((absent, "No such file"), (empty, "has no rows"), (text, "is not UTF-8: byte 8")):
            done = run(sys.executable, CONTRIB / program, file, *options)
            assert done.returncode == 1 and str(file) in done.stderr and sentence in done.stderr, done.stderr
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run(sys.executable, CONTRIB / "adapter_table.py", report)
    assert done.returncode == 1 and f"{report}: row 0 has no partitions" in done.stderr
    assert not picture.exists()
    done = run(sys.executable, CONTRIB / "recall_table.py", report)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("| streaming_llm | 0.")
    assert run(sys.executable, CONTRIB / "plot_recall.py", report, picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, sentence in ((tmp_path, "is a folder"), (tmp_path / "p.unknown", "must end in .png, .pdf or .svg")):
        for command in (
            ["plot_recall.py", report, name], ["plot_classifier.py", report, "--heads", "9:0", "--out", name],
        ):  # fmt: skip
            done = run(sys.executable, CONTRIB / command[0], *command[1:])
            assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    rows = [{"partitions": "a", "choice": "b", "budget": 0.05, "tokens": 8, "selectivity": 1, "mass_recall": 1,
             "output_error": 0}]  # fmt: skip
    report.write_text(json.dumps({"rows": rows}))
    assert run(sys.executable, CONTRIB / "adapter_table.py", report).returncode == 0
    done = run(sys.executable, CONTRIB / "adapter_table.py", report, "--budget", 0.07)
    assert done.returncode == 2 and "no rows of budget 0.07; there are 0.05" in done.stderr
    report.write_text(json.dumps({"rows": []}))
    done = run(sys.executable, CONTRIB / "adapter_table.py", report)
    assert done.returncode == 1 and done.stderr == f"error: {report} has no rows.\n"


def test_tools_for_traces_refuse_what_they_cannot_read(tmp_path):
    pytest.importorskip("safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no trace")
    sketch = ["sketch_ceilings.py", "--test", TRACE, "--train"]
    for command, sentence in (
        (["trace_geometry.py", tmp_path], "is a folder"),
        (["trace_geometry.py", tmp_path / "absent"], "absent"),
        (["trace_geometry.py", garbage], "garbage.safetensors is not a safetensors file"),
        (["trace_geometry.py", TRACE, "--heads", "9.7"], "--heads 9.7: no trace holds that head; they hold 21.0, 9.0"),
        ([*sketch, garbage], "garbage.safetensors is no trace with layer 9"),
        ([*sketch, TRACE, "--layers", "2"], "is no trace with layer 2"),
        ([*sketch, TRACE, "--queries", "0"], "0 must be at least 1"),
        (["random_traces.py", "--out", tmp_path / "out", "--tokens", "0"], "0 must be at least 1"),
        (["random_traces.py", "--out", tmp_path / "out", "--heads-q", "4"], "--heads-q 4 is not a multiple"),
    ):
        done = run(sys.executable, CONTRIB / command[0], *command[1:])
        assert done.returncode in (1, 2) and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [garbage]
    done = run(sys.executable, CONTRIB / "trace_geometry.py", TRACE, "--heads", "9.0")
    assert done.returncode == 0 and "| kjv_8k 9.0 | " in done.stdout and "21.0" not in done.stdout


def test_generated_trace_is_a_trace(tmp_path):
    made = tmp_path / "longer.safetensors"
    done = run(
        Path(BIN) / "generate_trace", "--trace", TRACE, "--layer", "9,21", "--tokens", 12000, "--out", made,
        "--json", tmp_path / "made.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert [r["layer"] for r in rows] == [9, 21] and all(0 < r["new"] <= 0.5 for r in rows)
    done = run(
        Path(BIN) / "bench_recall", "--trace", made, "--layer", "9,21", "--ncell", 128, "--queries", 8,
        "--methods", "oracle_topk,ivf_rope_ip,ivf_rope_l2", "--budget", 0.05, "--json", tmp_path / "recall.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "recall.json").read_text())
    assert report["config"]["tokens"] == 12000 and report["config"]["rope_scaling"].startswith("ntk:1.46")
    recall = {}
    for row in report["rows"]:
        recall.setdefault(row["method"], []).append(row["mass_recall"])
    assert sum(recall["oracle_topk"]) > sum(recall["ivf_rope_ip"]) > sum(recall["ivf_rope_l2"])


def test_bench_ann_reads_what_it_wrote(tmp_path):
    options = ["--ncell", 64, "-k", 5]
    done = run(
        Path(BIN) / "bench_ann", "--trace", TRACE, "--layer", 21, "--queries", 50, "--export", f"{tmp_path}/",
        "--json", tmp_path / "trace.json", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recalls = {}
    for kind in ("fvecs", "fbin"):
        done = run(
            Path(BIN) / "bench_ann", "--base", tmp_path / f"base.{kind}", "--query", tmp_path / f"query.{kind}",
            "--json", tmp_path / "files.json", *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for name in ("trace", "files"):
            report = json.loads((tmp_path / f"{name}.json").read_text())
            rows = [r for r in report["rows"] if r["method"] != "HNSW"]  # its graph depends on the threads
            recalls[kind, name] = [(r["method"], r["parameters"], r["recall"], r["selectivity"]) for r in rows]
            assert rows[0]["recall"] < 1 and recalls[kind, name][-1][2:] == (1.0, 1.0)
            assert report["pareto"]
        assert recalls[kind, "trace"] == recalls[kind, "files"]
