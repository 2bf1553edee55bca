"""contrib/gpu_decoding.py against the numpy model and its decoding: on a CUDA device where there is one, else over
gpu_stand_in.py in main memory."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads and the library's take turns
torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "contrib"), str(ROOT / "tests" / "python")]

pytest.importorskip("gguf")
import end_to_end  # noqa: E402
import gpu_decoding  # noqa: E402
import gpu_stand_in  # noqa: E402
from smollm2 import SmolLM2, has_cuda  # noqa: E402
from sparse_decoding import METHODS, CpuDecoding  # noqa: E402

import faiss_saap as fs  # noqa: E402

TOKENS, FIRST = 700, 694
DEVICE = "cuda" if fs.has_cuda and has_cuda() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def device():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(gpu_decoding, "GpuAttentionAdapter", gpu_stand_in.GpuAttentionAdapter)
            patch.setattr(gpu_decoding, "sequence_partitions", gpu_stand_in.gpu_sequence_partitions)
            patch.setattr(gpu_decoding, "DEVICE", "cpu")
            patch.setattr(end_to_end, "on_cuda", lambda options: options.device == "cuda")
            patch.setattr(torch.cuda, "get_device_name", lambda: "main memory")
        yield


@pytest.fixture(scope="module")
def model():
    return SmolLM2()


@pytest.fixture(scope="module")
def tokens(model):
    """Two texts of one length."""
    haystack = end_to_end.haystack_of(model, None)
    return np.stack([haystack[:TOKENS], haystack[2000 : 2000 + TOKENS]])


@pytest.fixture(scope="module")
def decoding(model):
    return gpu_decoding.GpuDecoding(model, 2)


@pytest.fixture(scope="module")
def cache(decoding, tokens):
    return decoding.prefill(tokens[:, :FIRST], TOKENS)


@pytest.fixture(scope="module")
def trained():
    return fs.read_partitions(str(ROOT / "data" / "smollm2_135m.saap"))


@pytest.fixture(scope="module")
def expected(model, tokens):
    return np.stack([model.forward(text)[FIRST:] for text in tokens])


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("window", "planned")])
def test_with_all_keys_read_every_method_is_the_model(decoding, tokens, cache, trained, expected, name):
    (method,) = decoding.methods([name], cache, trained, 32, 0.5)
    for _ in range(2):  # and again, after the tokens decoded are forgotten
        method.begin(1.0)
        hidden = decoding.decode(method, tokens[:, FIRST:], FIRST)
        assert (method.selectivity == 1).all() and method.counts()[0] == method.counts()[1] > 0
        assert relative(hidden.cpu().numpy(), expected) < 5e-3


@pytest.mark.parametrize("name", ["window", "oracle_topk", "ivf_rope_ip", "saap_blend", "union", "saap_codes"])
def test_each_text_is_decoded_as_alone_in_numpy(decoding, model, tokens, cache, trained, tmp_path, name):
    """Up to rounding, which the choice of cells may amplify, and k-means of the device's own."""
    (method,) = decoding.methods([name], cache, trained, 32, 0.25)
    method.begin(0.2)
    hidden = decoding.decode(method, tokens[:, FIRST:], FIRST).cpu().numpy()
    alone = CpuDecoding(model, tmp_path)
    for b in range(2):
        own = alone.prefill(tokens[b : b + 1, :FIRST], TOKENS)
        (other,) = alone.methods([name], own, trained, 32, 0.25)
        other.begin(0.2)
        theirs = alone.decode(other, tokens[b : b + 1, FIRST:], FIRST)[0]
        # cells learnt on the device and here differ, and with them what fits a budget
        assert method.selectivity[b] == pytest.approx(other.selectivity, rel=0.1 if "ivf" in name or "union" in name else 0.02)
        assert relative(hidden[b], theirs) < (0.01 if name in ("window", "oracle_topk") else 0.05)
        assert method.index_bytes() == other.index_bytes()
        loss = alone.nll(theirs[None, :-1], tokens[b : b + 1, FIRST + 1 :])
        assert decoding.nll(torch.from_numpy(theirs[None, :-1]).to(DEVICE), tokens[b : b + 1, FIRST + 1 :]) == (
            pytest.approx(loss, abs=1e-4))  # fmt: skip


def test_one_kv_head_of_one_layer_is_sparse(decoding, model, tokens, cache, trained, expected, tmp_path):
    (method,) = decoding.methods(["window"], cache, trained, 32, 0.5)
    errors = []
    for heads in ([0], [1], None):
        method.begin(0.0)
        hidden = decoding.decode(method, tokens[:, FIRST:], FIRST, range(9, 10), heads).cpu().numpy()
        errors.append(relative(hidden, expected))
        alone = CpuDecoding(model, tmp_path)
        own = alone.prefill(tokens[:1, :FIRST], TOKENS)
        (other,) = alone.methods(["window"], own, trained)
        other.begin(0.0)
        theirs = alone.decode(other, tokens[:1, FIRST:], FIRST, range(9, 10), heads)[0]
        assert relative(hidden[0], theirs) < 5e-3
    assert len(set(errors)) == 3 and max(errors) < 0.5


def test_programs(model, tmp_path, capsys):
    measured = ["--device", "cuda", "--texts-at-once", "2", "--budgets", "0.1", "--json", str(tmp_path / "r.json")]
    needle = ["needle", "--lengths", "1300", *measured, "--methods", "dense,saap"]
    for depths in ("2", "3"):  # the second time there is nothing to share with the first but its rows
        assert end_to_end.main([*needle, "--resume", "--depths", depths]) == 0
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["environment"]["device"]
    rows = report["rows"]
    assert len(rows) == 10 and len({(r["depth"], r["key"], r["method"]) for r in rows}) == 10
    assert all(r["digits_found"] == 1 for r in rows if r["method"] == "dense")
    assert np.mean([r["digits_found"] for r in rows if r["method"] == "saap"]) > 0.8
    sparse = [r for r in rows if r["method"] == "saap"]
    assert all(0.05 < r["selectivity"] <= 0.105 and r["index_bytes_fraction"] > 0 for r in sparse)

    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(model.decode(end_to_end.haystack_of(model, None)[2000 * i : 2000 * i + 700]))
    loss = ["loss", "--text", *map(str, files), "--tokens", "640", "--sparse", "4", *measured]
    assert end_to_end.main([*loss, "--methods", "dense,window"]) == 0
    on_device = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert end_to_end.main([*loss, "--methods", "dense,window", "--device", "cpu", "--cache", str(tmp_path)]) == 0
    losses = lambda rows: {(r["text"], r["method"]): r["loss"] for r in rows}
    in_numpy = losses(json.loads((tmp_path / "r.json").read_text())["rows"])
    assert losses(on_device) == pytest.approx(in_numpy, abs=5e-3) and len(in_numpy) == 6
    assert end_to_end.main([*loss, "--resume", "--methods", "window", "--layer-groups", "3", "--kv-heads"]) == 0
    parts = {r["layers"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert len(parts) == 1 + 3 * 3 and {"all", "0-9/0", "20-29/2"} <= parts
    capsys.readouterr()
    assert end_to_end.main(["stream", "--tokens", "700", "--seed", "5", "--methods", "saap", "--budget", "1",
                            "--device", "cuda"]) == 0  # fmt: skip
    assert capsys.readouterr().out.rstrip().endswith("found")
