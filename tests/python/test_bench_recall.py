"""`bench_recall` against an independent evaluator in float64 numpy, and its manners at the command line.

FAISS_SAAP_BIN names the folder of the programs, FAISS_SAAP_TRACE a trace with layers 9 and 21 in fp16 or fp32.
"""

import json
import math
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import rope_reference  # noqa: E402

KV_HEAD = 0
NCELL = 256
QUERIES = 64
SINK = 16
WINDOW = 256
BUDGETS = [0.02, 0.05, 0.1]
METHODS = ["oracle_topk", "ivf_rope_l2", "ivf_rope_ip"]
# float32 scores can swap two cells that are nearly equal: one of 64 queries then reads another cell
TOLERANCE = 1e-3

ROW_KEYS = {
    "method", "layer", "kv_head", "query_head", "budget", "selectivity", "head_selectivity", "mass_recall", "ceiling",
    "output_error", "index_bytes_fraction", "us_per_query",
}  # fmt: skip


@pytest.fixture(scope="session")
def program():
    folder = os.environ.get("FAISS_SAAP_BIN")
    if not folder:
        pytest.skip("FAISS_SAAP_BIN does not name the folder of the programs")
    path = Path(folder) / "bench_recall"
    if not path.is_file():
        pytest.skip(f"FAISS_SAAP_BIN={folder} has no bench_recall")
    return path


@pytest.fixture(scope="session")
def trace():
    path = os.environ.get("FAISS_SAAP_TRACE")
    if not path:
        pytest.skip("FAISS_SAAP_TRACE does not name a trace file")
    if not Path(path).is_file():
        pytest.skip(f"FAISS_SAAP_TRACE={path} is no file")
    return Path(path)


def run(program, *options):
    return subprocess.run([program, *map(str, options)], capture_output=True, text=True, timeout=300)


def load_layer(path, layer):
    """Post-RoPE queries [group, N, d] and keys [N, d] and values [N, d] of one KV head, float64."""
    with safe_open(path, "numpy") as file:
        if f"layer.{layer}.q" not in file.keys():
            pytest.skip(f"{path} has no layer {layer}")
        q, k, v = (file.get_tensor(f"layer.{layer}.{name}").astype(np.float64) for name in "qkv")
        metadata = file.metadata()
    assert metadata["rope_applied"] == "no"
    group = len(q) // len(k)
    q, k, v = q[KV_HEAD * group : (KV_HEAD + 1) * group], k[KV_HEAD], v[KV_HEAD]
    inverse_frequency, magnitude = rope_reference.parameters(
        k.shape[-1], float(metadata["rope_theta"]), metadata.get("rope_scaling", "")
    )
    position = np.arange(len(k))
    layout = metadata["rope_layout"]
    q = rope_reference.rotate(q, position, inverse_frequency, magnitude, layout)
    k = rope_reference.rotate(k, position, inverse_frequency, magnitude, layout)
    return q, k, v


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def cells_that_fit(score, count, limit):
    """Cells by descending score; one that would exceed the limit is passed over for later ones that fit.

    score [ncell], count [ncell]: far keys of each cell. Returns bool [ncell].
    """
    taken = np.zeros(len(count), dtype=bool)
    room = limit
    for cell in np.argsort(-score, kind="stable"):
        if count[cell] <= room:
            taken[cell] = True
            room -= count[cell]
    return taken


def evaluate(q, k, v, cells, means):
    """All figures of oracle_topk and ivf_rope_ip by their definitions.

    q [group, N, d] and k [N, d] post-RoPE, v [N, d], cells [N], means [ncell, d].
    Returns {(method, budget, query_head within the group): {figure: value}}.
    """
    group, tokens, d = q.shape
    ncell = len(means)
    # Per query: what was read and how far off the output is; ratios of sums and means are taken at the end.
    read = defaultdict(lambda: np.zeros(QUERIES))

    for t in range(QUERIES):
        i = tokens // 2 + t * max(1, tokens // (2 * QUERIES))
        far = slice(SINK, i - WINDOW + 1)
        nfar = i - WINDOW - SINK + 1
        assert nfar > 0
        far_cells = cells[far]
        count = np.bincount(far_cells, minlength=ncell)

        for budget in BUDGETS:
            limit = math.floor(budget * nfar)
            by_any_head = {method: np.zeros(nfar, dtype=bool) for method in ("oracle_topk", "ivf_rope_ip")}

            for head in range(group):
                mass = softmax(k[: i + 1] @ q[head, i] / math.sqrt(d))
                dense = mass @ v[: i + 1]
                far_mass = mass[far]
                mass_per_key = np.bincount(far_cells, far_mass, ncell) / np.maximum(count, 1)

                chosen = {}
                chosen["oracle_topk"] = np.zeros(nfar, dtype=bool)
                chosen["oracle_topk"][np.argsort(-far_mass, kind="stable")[:limit]] = True
                chosen["ivf_rope_ip"] = cells_that_fit(means @ q[head, i], count, limit)[far_cells]
                best = cells_that_fit(mass_per_key, count, limit)[far_cells]

                for method, keys in chosen.items():
                    by_any_head[method] |= keys
                    weights = mass.copy()
                    weights[far][~keys] = 0
                    output = weights @ v[: i + 1] / weights.sum()
                    key = method, budget, head
                    read[(*key, "far")][t] = far_mass.sum()
                    read[(*key, "mass")][t] = far_mass[keys].sum()
                    read[(*key, "best")][t] = far_mass[best].sum()
                    read[(*key, "head_selectivity")][t] = keys.sum() / nfar
                    read[(*key, "output_error")][t] = np.linalg.norm(output - dense) / np.linalg.norm(dense)

            for method, keys in by_any_head.items():
                for head in range(group):
                    read[method, budget, head, "selectivity"][t] = keys.sum() / nfar

    result = {}
    for method, budget, head in {key[:3] for key in read}:
        values = {key[3]: value for key, value in read.items() if key[:3] == (method, budget, head)}
        result[method, budget, head] = {
            "mass_recall": values["mass"].sum() / values["far"].sum(),
            "ceiling": values["best"].sum() / values["far"].sum() if method == "ivf_rope_ip" else None,
            "selectivity": values["selectivity"].mean(),
            "head_selectivity": values["head_selectivity"].mean(),
            "output_error": values["output_error"].mean(),
        }
    return result


class Measured:
    """One run of bench_recall, and the trace that it read."""

    def __init__(self, program, trace, layer, folder):
        self.layer = layer
        self.q, self.k, self.v = load_layer(trace, layer)
        done = run(
            program, "--trace", trace, "--layer", layer, "--kv-head", KV_HEAD, "--methods", ",".join(METHODS),
            "--ncell", NCELL, "--budget", ",".join(map(str, BUDGETS)), "--queries", QUERIES, "--sink", SINK,
            "--window", WINDOW, "--save-cells", folder / "cells.safetensors", "--json", folder / "result.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        saved = load_file(folder / "cells.safetensors")
        self.cells, self.means = saved["cells"], saved["means"]
        self.report = json.loads((folder / "result.json").read_text())
        group = len(self.q)
        self.rows = {
            (row["method"], row["budget"], row["query_head"] - KV_HEAD * group): row for row in self.report["rows"]
        }


@pytest.fixture(scope="module", params=[9, 21], ids=lambda layer: f"layer{layer}")
def measured(request, program, trace, tmp_path_factory):
    return Measured(program, trace, request.param, tmp_path_factory.mktemp("recall"))


def test_report_has_every_key(measured):
    assert {"config", "environment", "rows"} <= measured.report.keys()
    for row in measured.report["rows"]:
        assert ROW_KEYS <= row.keys()
        assert (row["layer"], row["kv_head"]) == (measured.layer, KV_HEAD)
        assert (row["ceiling"] is None) == (row["method"] == "oracle_topk")
    expected = {(m, b, h) for m in METHODS for b in BUDGETS for h in range(len(measured.q))}
    assert measured.rows.keys() == expected
    assert len(measured.report["rows"]) == len(expected)


def test_saved_means_are_the_means_of_the_saved_cells(measured):
    cells, means, k = measured.cells, measured.means, measured.k
    assert cells.dtype == np.int32 and cells.shape == (len(k),)
    assert means.dtype == np.float32 and means.shape == (NCELL, k.shape[1])
    assert cells.min() >= 0 and cells.max() < NCELL
    for cell in np.unique(cells):
        np.testing.assert_allclose(means[cell], k[cells == cell].mean(axis=0), rtol=0, atol=1e-4)


def test_rows_agree_with_the_definitions(measured):
    expected = evaluate(measured.q, measured.k, measured.v, measured.cells, measured.means.astype(np.float64))
    wrong = []
    for key, figures in expected.items():
        for name, value in figures.items():
            got = measured.rows[key][name]
            if value is None or got is None:
                same = got is value
            else:
                same = abs(got - value) <= TOLERANCE
            if not same:
                wrong.append(f"{key} {name}: bench_recall {got}, definition {value}")
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_symmetric_assigner_has_the_same_cells(measured):
    for (method, budget, head), row in measured.rows.items():
        if method == "ivf_rope_l2":
            assert row["ceiling"] == pytest.approx(measured.rows["ivf_rope_ip", budget, head]["ceiling"], abs=1e-9)
            assert row["mass_recall"] <= row["ceiling"] + 0.02


def test_no_head_reads_more_than_its_budget(measured):
    for (_, budget, _), row in measured.rows.items():
        assert row["head_selectivity"] <= budget
        assert row["head_selectivity"] <= row["selectivity"] <= len(measured.q) * budget


@pytest.mark.parametrize("option", [["--no-such-option", "1"], ["--methods", "no_such_method"], ["stray"]])
def test_unknown_options_are_refused(program, trace, option):
    assert run(program, "--trace", trace, "--layer", 9, *option).returncode != 0


def assert_one_sentence(done):
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stderr.startswith("error:"), done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    # Faiss's exceptions name the function and the source line: right for a developer, noise for a user
    for noise in ("terminate", "what()", "Traceback", ".cpp", " at 0x", "Error in "):
        assert noise not in done.stderr, done.stderr


def test_missing_trace(program, tmp_path):
    assert_one_sentence(run(program, "--trace", tmp_path / "absent.safetensors", "--layer", 9))


@pytest.mark.parametrize("keep", ["nothing", "part of the length", "part of the header", "half", "all but a byte"])
def test_truncated_trace(program, trace, tmp_path, keep):
    content = trace.read_bytes()
    size = {
        "nothing": 0,
        "part of the length": 4,
        "part of the header": 40,
        "half": len(content) // 2,
        "all but a byte": len(content) - 1,
    }[keep]
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(content[:size])
    assert_one_sentence(run(program, "--trace", path, "--layer", 9, "--queries", QUERIES))


def test_layer_that_is_not_in_the_trace(program, trace):
    assert_one_sentence(run(program, "--trace", trace, "--layer", 12345))


def test_more_cells_than_tokens(program, trace):
    with safe_open(trace, "numpy") as file:
        tokens = file.get_slice("tokens").get_shape()[0]
        layer = next(key.split(".")[1] for key in sorted(file.keys()) if key.endswith(".q"))
    if tokens >= 65536:
        pytest.skip("the trace has more tokens than a partition may have cells")
    assert_one_sentence(run(program, "--trace", trace, "--layer", layer, "--ncell", tokens + 1))
