"""What every program in build/bin promises: --help, no unknown options, one sentence for wrong input, JSON."""

import json
import os
import subprocess
from pathlib import Path

import pytest

BIN = os.environ.get("FAISS_SAAP_BIN")
TRACE = os.environ.get("FAISS_SAAP_TRACE")
if not BIN or not TRACE:
    pytest.skip("FAISS_SAAP_BIN and FAISS_SAAP_TRACE are not set", allow_module_level=True)

PROGRAMS = sorted(p for p in Path(BIN).iterdir() if p.name == "demo" or p.name.startswith(("bench_", "train_")))


def run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)


def test_there_are_programs():
    expected = {"demo", "bench_classifier", "bench_recall", "bench_search", "train_partitions"}
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


def test_demo_on_wrong_input(tmp_path):
    result = run(Path(BIN) / "demo", "--trace", tmp_path / "absent")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    result = run(Path(BIN) / "demo", "--trace", TRACE, "--json", tmp_path / "no" / "folder.json", "--ncell", 8192)
    assert result.returncode == 1 and "ncell = 8192" in result.stderr
