"""`train_partitions` from the command line, and what `bench_recall` makes of its file, against numpy.

FAISS_SAAP_BIN names the folder of the programs, FAISS_SAAP_TRACE a trace with layers 9 and 21 in fp16 or fp32.
"""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")
from safetensors import safe_open  # noqa: E402

from test_bench_recall import (  # noqa: E402
    BUDGETS, KV_HEAD, SINK, TOLERANCE, WINDOW, assert_one_sentence, cells_that_fit, load_layer, run, softmax, trace,
)  # fmt: skip

__all__ = ["trace"]  # a fixture
LAYER = 9
NCELL = 128
QUERIES = 32
SMALL = ["--layers", LAYER, "--kv-heads", KV_HEAD, "--ncell", NCELL, "--width", 64, "--batch", 64, "--steps", 120]


@pytest.fixture(scope="session")
def programs():
    folder = os.environ.get("FAISS_SAAP_BIN")
    if not folder or not (Path(folder) / "train_partitions").is_file():
        pytest.skip(f"FAISS_SAAP_BIN={folder} has no train_partitions")
    return Path(folder)


def train(programs, trace, out, *options):
    return run(programs / "train_partitions", "--trace", trace, *SMALL, "--out", out, *options)


@pytest.fixture(scope="module")
def trained(programs, trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    done = train(programs, trace, folder / "p.saap", "--json", folder / "train.json")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir() if p.name.startswith("p.saap")] == ["p.saap"], "checkpoints are removed"
    return folder / "p.saap", json.loads((folder / "train.json").read_text())


def read_bfloat16(path, name):
    """A BF16 tensor as float64: numpy has no such type."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in header["data_offsets"])
    bits = np.frombuffer(content[begin:end], np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(header["shape"]).astype(np.float64)


class Partition:
    """The file, read without the library."""

    def __init__(self, path):
        self.path = path
        self.prefix = f"layer.{LAYER}.kv.{KV_HEAD}"
        with safe_open(path, "numpy") as file:
            self.metadata = file.metadata()
            self.about = json.loads(self.metadata[self.prefix])
            self.bias = {
                name: file.get_tensor(f"{self.prefix}.{name}.bias").astype(np.float64)
                for name in ("in", "out")
            }
        self.centroids = read_bfloat16(path, f"{self.prefix}.centroids")
        self.weight = {name: read_bfloat16(path, f"{self.prefix}.{name}.weight") for name in self.bias}

    def cells(self, keys):
        """Nearest centroid [N] of de-rotated keys [N, d]."""
        return np.argmin((self.centroids**2).sum(1) - 2 * keys @ self.centroids.T, axis=1)

    def scores(self, query, head):
        """Scores [ncell] of a pre-RoPE query [d], by the definition of the network."""

        def layer(name, x, bias):
            weight = self.weight[name][0]
            return weight[:, : len(x)] @ x + self.bias[name][bias]

        return layer("out", np.maximum(layer("in", query, head), 0), 0)


def test_the_file_says_what_it_is(trained, trace):
    path, report = trained
    partition = Partition(path)
    meta, about = partition.metadata, partition.about
    assert meta["format"] == "faiss_saap.partitions" and meta["format_version"] == "5"
    with safe_open(trace, "numpy") as file:
        theirs = file.metadata()
    assert meta["model"] == theirs["model"]
    assert json.loads(meta["texts"]) == [theirs["text"]]
    assert json.loads(meta["rope"])["theta"] == float(theirs["rope_theta"])
    assert json.loads(meta["training"]) == {"sink": SINK, "window": WINDOW, "seed": 1234}
    assert about["ncell"] == NCELL and about["width"] == 64 and about["depth"] == 0 and about["share_input"] and about["share_trunk"]
    assert len(report["rows"]) == 3
    for row, (recall, ceiling, far_mass) in zip(report["rows"], about["held_out"]):
        assert (row["mass_recall"], row["ceiling"], row["far_mass"]) == pytest.approx((recall, ceiling, far_mass))
        assert 0 < recall <= ceiling + 0.02
        assert row["imbalance"] >= 1 and row["largest_cell"] >= row["keys"] / NCELL


def test_bench_recall_agrees_with_the_definitions(programs, trained, trace, tmp_path):
    path, _ = trained
    methods = ["offline_ip", "saap", "saap_group"]
    done = run(
        programs / "bench_recall", "--trace", trace, "--layer", LAYER, "--methods", ",".join(methods), "--partitions",
        path, "--budget", ",".join(map(str, BUDGETS)), "--queries", QUERIES, "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {
        (row["method"], row["budget"], row["query_head"]): row
        for row in json.loads((tmp_path / "r.json").read_text())["rows"]
    }

    partition = Partition(path)
    q, k, _ = load_layer(trace, LAYER)
    with safe_open(trace, "numpy") as file:
        q_pre = file.get_tensor(f"layer.{LAYER}.q").astype(np.float64)
        k_pre = file.get_tensor(f"layer.{LAYER}.k")[KV_HEAD].astype(np.float64)
    cells = partition.cells(k_pre)
    group, tokens, d = q.shape
    read = {key: np.zeros(3) for key in rows}  # mass read, mass of the ceiling, mass of the far keys
    for t in range(QUERIES):
        i = tokens // 2 + t * max(1, tokens // (2 * QUERIES))
        far = slice(SINK, i - WINDOW + 1)
        far_cells = cells[far]
        count = np.bincount(far_cells, minlength=NCELL)
        mass = [softmax(k[: i + 1] @ q[h, i] / math.sqrt(d))[far] for h in range(group)]
        scores = {"saap": [partition.scores(q_pre[h, i], h) for h in range(group)]}
        scores["offline_ip"] = [partition.centroids @ q_pre[h, i] for h in range(group)]
        shared = np.zeros(NCELL)
        for s in scores["saap"]:
            weight = np.exp((s - s.max()) / math.sqrt(d))
            shared += weight / (weight * count).sum()
        scores["saap_group"] = [shared] * group
        per_cell = [np.bincount(far_cells, m, NCELL) for m in mass]
        for (method, budget, head), sums in read.items():
            limit = math.floor(budget * len(far_cells))
            true = sum(per_cell) if method == "saap_group" else per_cell[head]
            taken = cells_that_fit(scores[method][head], count, limit)
            best = cells_that_fit(true / np.maximum(count, 1), count, limit)
            sums += [per_cell[head][taken].sum(), per_cell[head][best].sum(), mass[head].sum()]
    for key, (mass, best, far) in read.items():
        # float32 can swap two cells that are nearly equal: one of few queries then reads another cell
        assert rows[key]["mass_recall"] == pytest.approx(mass / far, abs=3 * TOLERANCE), key
        assert rows[key]["ceiling"] == pytest.approx(best / far, abs=3 * TOLERANCE), key
    for method in methods:
        group_reads = [rows[method, 0.05, h]["selectivity"] for h in range(group)]
        own = [rows[method, 0.05, h]["head_selectivity"] for h in range(group)]
        assert (group_reads == own) == (method == "saap_group")


def test_same_seed_same_file(programs, trained, trace, tmp_path):
    path, _ = trained
    assert train(programs, trace, tmp_path / "again.saap").returncode == 0
    assert (tmp_path / "again.saap").read_bytes() == path.read_bytes()
    assert train(programs, trace, tmp_path / "other.saap", "--seed", 5).returncode == 0
    assert (tmp_path / "other.saap").read_bytes() != path.read_bytes()


def test_resumed_equals_uninterrupted(programs, trace, tmp_path):
    """Killed after the first of two partitions, whose checkpoint is on disk."""
    command = [programs / "train_partitions", "--trace", trace, *SMALL, "--layers", "9,21"]
    command[command.index("--layers") : command.index("--layers") + 2] = []
    command = [str(c) for c in command]
    whole, part = tmp_path / "whole.saap", tmp_path / "part.saap"
    assert subprocess.run([*command, "--out", whole], timeout=300, capture_output=True).returncode == 0
    process = subprocess.Popen([*command, "--out", str(part)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "part.saap.state"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not part.exists()
    refused = run(*command, "--out", part, "--resume", "--seed", 77)
    assert_one_sentence(refused)
    assert "other texts or options" in refused.stderr
    done = run(*command, "--out", part, "--resume")
    assert done.returncode == 0, done.stderr
    assert part.read_bytes() == whole.read_bytes()
    assert not state.exists() and not (tmp_path / "part.saap.part").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--ncell", 9000], "ncell = 9000"),
        (["--window", 9000], "leave no far keys"),
        (["--layers", 12], "has no layer 12"),
        (["--kv-heads", 1], "KV head 1"),
        (["--out", "/no/such/folder/p.saap"], "cannot be created"),
    ],
)
def test_wrong_input(programs, trace, tmp_path, options, sentence):
    base = {"--layers": LAYER, "--kv-heads": KV_HEAD, "--ncell": 16, "--steps": 1, "--out": tmp_path / "p.saap"}
    base.update(zip(options[::2], options[1::2]))
    done = run(programs / "train_partitions", "--trace", trace, *(x for pair in base.items() for x in pair))
    assert_one_sentence(done)
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_only_devices_that_there_are(programs, trace, tmp_path):
    assert train(programs, trace, tmp_path / "p.saap", "--device", "tpu").returncode != 0


def test_partitions_of_another_model_are_refused(programs, trained, trace, tmp_path):
    content = trained[0].read_bytes()
    assert b'theta\\":100000.0' in content, "the trace's theta, as JSON in JSON"
    other = tmp_path / "other.saap"
    other.write_bytes(content.replace(b'theta\\":100000.0', b'theta\\":500000.0'))
    bench = [programs / "bench_recall", "--trace", trace, "--layer", LAYER, "--methods", "saap"]
    done = run(*bench, "--partitions", other)
    assert_one_sentence(done)
    assert "theta 500000" in done.stderr
    done = run(*bench)
    assert_one_sentence(done)
    assert "--partitions" in done.stderr
    done = run(*bench, "--partitions", trace)
    assert_one_sentence(done)
    assert "no file of partitions" in done.stderr


def choose(programs, trained, trace, *options):
    return run(programs / "choose_partitions", "--partitions", trained[0], "--trace", trace, "--queries", 6, *options)


def test_choosing_keeps_to_the_budget(programs, trained, trace, tmp_path):
    out, report = tmp_path / "planned.saap", tmp_path / "plans.json"
    done = choose(
        programs, trained, trace, "--lookup-trace", trace, "--test-trace", trace, "--asked", 4, "--byte-budget", 0.3,
        "--out", out, "--json", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan, = json.loads(Partition(out).metadata["plans"])
    assert (plan["layer"], plan["kv_head"], plan["byte_budget"]) == (LAYER, KV_HEAD, 0.3)
    with safe_open(trace, "numpy") as file:
        text, tokens = file.metadata()["text"], len(file.get_tensor("tokens"))
    assert plan["tokens"] == tokens
    assert json.loads(Partition(out).metadata["plan_texts"]) == [text, text]
    rows = json.loads(report.read_text())["rows"]
    assert {row["role"] for row in rows} == {"text", "lookup", "test"}
    chosen = {row["role"]: row for row in rows if row["chosen"]}
    assert len([row for row in rows if row["chosen"]]) == 3
    assert chosen["text"]["mass_recall"] == pytest.approx(plan["recall"], abs=1e-9)
    assert chosen["text"]["bytes_fraction"] <= 0.3 * 1.02
    # the text that it was chosen by, and the same one as a test
    for field in ("mass_recall", "output_error", "bytes_fraction", "far_mass"):
        assert chosen["test"][field] == chosen["text"][field]

    def loss(role, method):
        return sum(1 - r["mass_recall"] + r["output_error"] for r in rows if (r["role"], r["method"]) == (role, method))

    fits = [r["method"] for r in rows if r["role"] == "text" and r["bytes_fraction"] <= 0.3 * 1.02]
    good = [m for m in fits if loss("lookup", m) <= loss("lookup", "classifier")]
    assert chosen["text"]["method"] == min(good, key=lambda m: loss("text", m))
    # the cells and networks are those of the file that was read
    assert (Partition(out).centroids == Partition(trained[0]).centroids).all()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--byte-budget", 0.0001], "leaves nothing for keys"),
        (["--layers", 10], "no partition of these layers"),
        (["--window", 5000], "sink and window"),
        (["--test-trace", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_choosing_with_wrong_input(programs, trained, trace, tmp_path, options, sentence):
    done = choose(programs, trained, trace, *options, "--out", tmp_path / "no.saap")
    assert done.returncode == 1
    assert_one_sentence(done)
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())
