"""A model decoding through the library in all its layers: against its own forward pass, its budgets, its programs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "contrib"))

pytest.importorskip("gguf")
import end_to_end  # noqa: E402
import end_to_end_results  # noqa: E402
from pass_key import DIGITS, hide_pass_key  # noqa: E402
from smollm2 import SmolLM2  # noqa: E402
from sparse_decoding import METHODS, KvCache, cached_prefill, decode, make_methods, prefill  # noqa: E402

import faiss_saap as fs  # noqa: E402

TOKENS, FIRST = 900, 892  # 364 far keys or more for each of the last 8 tokens


@pytest.fixture(scope="module")
def model():
    return SmolLM2()


@pytest.fixture(scope="module")
def tokens(model):
    return end_to_end.haystack_of(model, None)[:TOKENS]


@pytest.fixture(scope="module")
def cache(model, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefill")
    first = cached_prefill(model, tokens[:FIRST], TOKENS, folder)
    second = cached_prefill(model, tokens[:FIRST], TOKENS, folder)  # from the file
    assert np.array_equal(first.k, second.k) and np.array_equal(first.v, second.v) and second.length == FIRST
    assert len(list(folder.iterdir())) == 1
    return second


@pytest.fixture(scope="module")
def trained():
    set = fs.read_partitions(str(ROOT / "data" / "smollm2_135m.saap"))
    # a head of each kind, which may read everything
    ways = [dict(trained="classifier", trained_share=1), dict(keys_per_cell=20, own_share=1),
            dict(trained="mean", segment=100, trained_share=1)]  # fmt: skip
    set.plans = [
        fs.ProbePlan(layer=p.layer, kv_head=p.kv_head, tokens=TOKENS, **ways[p.kv_head]) for p in set.partitions
    ]
    return set


@pytest.fixture(scope="module")
def expected(model, tokens):
    """Hidden states of the last tokens by the model's own dense attention, which knows nothing of the library."""
    return model.forward(tokens)[FIRST:]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("window", "ivf_rope_ip")])
def test_with_all_keys_read_every_method_is_the_model(model, tokens, cache, trained, expected, name):
    (method,) = make_methods([name], cache, model, trained)
    method.begin(1.0)
    hidden = decode(model, method, tokens[FIRST:], FIRST)
    assert method.selectivity == 1
    # the cache is float16, the model's own pass float32
    assert relative(hidden, expected) < 5e-3


def test_budgets_are_kept_and_reading_more_errs_less(model, tokens, cache, trained, expected):
    for method in make_methods(["window", "oracle_topk", "saap"], cache, model, trained):
        errors = []
        for budget in (0.1, 0.5):
            method.begin(budget)
            errors.append(relative(decode(model, method, tokens[FIRST:], FIRST), expected))
            if method.name == "window":
                assert method.selectivity == 0 and errors[0] > 0.02
            else:
                assert 0.5 * budget < method.selectivity <= budget * 1.05
        assert method.name == "window" or errors[1] < errors[0]


def test_plans_are_followed(model, tokens, cache, trained):
    layer = fs.LayerPlan(trained, 3, 3)
    assert layer.keys_per_cell == [0, 20, 0] and layer.policy.head_split == [[1], [1], [1]]
    assert [[p.ncell for p in head] for head in layer.trained] == [[256], [], [256 * -(-TOKENS // 100)]]
    own = layer.own(cache.view(3, FIRST), 16, FIRST)
    assert [[p.ncell for p in head] for head in own] == [[], [(FIRST - 16) // 20], []]
    before = trained.plans
    trained.plans = [
        fs.ProbePlan(layer=p.layer, kv_head=p.kv_head, trained="mean", trained_share=0.2, keys_per_cell=20, own_share=0.1)
        for p in trained.partitions
    ]
    (method,) = make_methods(["planned"], cache, model, trained)
    trained.plans = before
    method.begin(1.0)
    decode(model, method, tokens[FIRST:], FIRST)
    assert 0.1 < method.selectivity <= 0.3
    with pytest.raises(fs.Error, match="no query assigner 'oracle'"):
        fs.ProbePlan(trained="oracle")
    with pytest.raises(fs.Error, match="no field 'share'"):
        fs.ProbePlan(share=1)


def test_a_prefill_goes_on_from_another(model, tokens, cache):
    begun = KvCache(model, TOKENS)
    begun.copy_of(cache, 300)
    prefill(model, tokens[:400], begun)
    assert begun.length == 400
    for mine, theirs in ((begun.k, cache.k), (begun.v, cache.v)):
        assert relative(mine[:, :, :400].astype(np.float32), theirs[:, :, :400].astype(np.float32)) < 2e-3


def test_a_pass_key_is_hidden_whole(model, tokens):
    hidden = hide_pass_key(model, tokens, 500, 0.5, seed=3)
    text = model.decode(hidden.tokens)
    assert len(hidden.tokens) == 500 and text.count(hidden.key) == 3
    assert model.decode(hidden.tokens[-DIGITS:]) == hidden.key and not model.decode(hidden.prompt).endswith(hidden.key)
    assert 200 < hidden.needle < 250
    with pytest.raises(ValueError, match="there are 900"):
        hide_pass_key(model, tokens, 2000, 0.5, seed=3)


def test_programs(tmp_path, capsys, monkeypatch):
    common = ["--cache", str(tmp_path / "cache")]
    measured = ["--budgets", "0.1", "--methods", "dense,window,saap", "--json", str(tmp_path / "r.json"),
                "--plot", str(tmp_path / "r.png")]  # fmt: skip
    assert end_to_end.main(["needle", "--lengths", "1300", "--depths", "1", *common, *measured]) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["dense"]["digits_found"] == 1 and rows["dense"]["selectivity"] == 1
    assert rows["window"]["digits_found"] < 1  # the key lies before it
    assert 0.05 < rows["saap"]["selectivity"] <= 0.105 and rows["saap"]["index_bytes_fraction"] > 0
    assert (tmp_path / "r.png").stat().st_size > 1000

    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was long. " * 100)
    loss = ["loss", "--text", str(text), "--tokens", "700", "--sparse", "8", *common, *measured]
    assert end_to_end.main(loss) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert 0 < rows["dense"]["loss"] < 0.5  # it has read that sentence before

    # goes on where it stopped, and attends sparsely in some layers alone
    before = json.loads((tmp_path / "r.json").read_text())["rows"]
    parts = ["--layer-groups", "2", "--resume", "--plot", str(tmp_path / "layers.png")]
    assert end_to_end.main([*loss, *parts]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert rows[: len(before)] == before
    assert [(r["method"], r["layers"]) for r in rows[len(before) :]] == [
        ("window", "0-14"), ("window", "15-29"), ("saap", "0-14"), ("saap", "15-29")]  # fmt: skip
    dense, *window = (r["loss"] for r in rows if r["method"] in ("dense", "window"))
    assert len({dense, *window}) == 4 and all(abs(w - dense) < 1 for w in window)
    assert (tmp_path / "layers.png").stat().st_size > 1000
    capsys.readouterr()
    assert end_to_end.main([*loss, "--resume", "--partitions", str(tmp_path / "other.saap")]) == 1
    assert "made with partitions = smollm2_135m.saap" in capsys.readouterr().err
    assert end_to_end.main([*loss, "--methods", "planned"]) == 1
    assert "smollm2_135m.saap has no plans" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(end_to_end, "on_cuda", lambda options: True)
        options = end_to_end.parse([*loss, "--methods", "planned"])
        with pytest.raises(ValueError, match="planned needs --device cpu"):
            end_to_end.trained_of(options, options.methods)
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(b"\xff")
    assert end_to_end.main([*loss[:2], str(wrong), *loss[3:]]) == 1
    assert f"{wrong} is not UTF-8" in capsys.readouterr().err
    wrong.write_text('{"rows": []}')
    assert end_to_end.main([*loss, "--resume", "--json", str(wrong)]) == 1
    assert f"{wrong}: config has no command" in capsys.readouterr().err
    assert end_to_end_results.main([str(wrong)]) == 1
    assert "hold no rows" in capsys.readouterr().err
    assert end_to_end_results.main([str(tmp_path / "r.json")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)

    assert end_to_end.main(["stream", "--tokens", "700", "--seed", "5", "--methods", "dense", *common]) == 0
    out = capsys.readouterr().out
    key = out.split("A pass key, ")[1][:DIGITS]
    answer = out.splitlines()[-1]
    assert "".join(part[-1] for part in answer.split("[")[:DIGITS]) == key and answer.endswith("found")
    assert answer.count("[100.0%]") == DIGITS


def test_differences_are_paired_and_intervals_are_those_of_student():
    random = np.random.default_rng(2)
    for n, quantile in ((4, 3.182), (8, 2.365), (31, 2.042), (101, 1.984)):
        x = random.standard_normal(n)
        assert end_to_end_results.half_width(x) == pytest.approx(quantile * x.std(ddof=1) / n**0.5, rel=0.01)
    assert end_to_end_results.half_width([1.0, 2.0, 3.0]) == np.inf
    common = {"text": "t", "tokens": 9, "depth": 0.5, "budget": 0.1, "selectivity": 0.1, "index_bytes_fraction": 0}
    row = lambda key, method, found: {**common, "key": key, "method": method, "digits_found": found}
    found = {"a": (1.0, 0.8), "b": (0.2, 0.2), "c": (0.6, 0.8), "d": (1.0, 0.2)}
    rows = [row(key, method, x) for key, pair in found.items() for method, x in zip(("dense", "saap"), pair)]
    dense, saap = end_to_end_results.table_of(rows)
    differences = [-0.2, 0.0, 0.2, -0.8]
    assert "difference" not in dense and saap["cases"] == 4 and saap["digits_found"] == pytest.approx(0.5)
    assert saap["difference"] == pytest.approx(-0.2)
    assert saap["half_width"] == pytest.approx(3.182 * np.std(differences, ddof=1) / 2, rel=0.01)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["loss", "--text", "x", "--tokens", "600"], "--tokens 600 leaves no far keys"),
        (["needle", "--methods", "saap,magic"], "'magic' must be one of"),
        (["needle", "--budgets", "2"], "must be from 0 to 1"),
        (["needle", "--rounds", "0"], "--rounds 0 must be positive"),
        (["needle", "--rope-scale", "0"], "--rope-scale 0 must be positive"),
        (["needle", "--lengths", "4096,-1"], "--lengths -1 must be positive"),
        (["stream", "--tokens", "0"], "--tokens 0 must be positive"),
        (["stream", "--prompt", ""], "--prompt '' asks nothing"),
        (["stream", "--nonsense"], "--nonsense"),
        ([], "required"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        end_to_end.main(arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_results_do_not_take_the_place_of_a_text(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("old")
    for option, path, words in (
        ("--json", tmp_path / "text.txt", "is read, too"),
        ("--plot", tmp_path / "no" / "p.png", "does not exist"),
    ):
        assert end_to_end.main(["loss", "--text", str(tmp_path / "text.txt"), option, str(path)]) == 1
        assert words in capsys.readouterr().err
    assert (tmp_path / "text.txt").read_text() == "old"


def test_what_is_not_there_is_named(capsys, tmp_path):
    assert end_to_end.main(["loss", "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err
    assert end_to_end.main(["needle", "--lengths", "1300,20000", "--cache", str(tmp_path)]) == 1
    assert "--lengths asks for 20,000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # before the first text is read
    assert end_to_end.main(["needle", "--lengths", "20", "--cache", str(tmp_path)]) == 1
    assert "20 tokens are too few for a pass key" in capsys.readouterr().err
