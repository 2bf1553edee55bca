#!/usr/bin/env python3
"""Turns the runs of bench_methods.py into a results file, plots, a table and a page that opens without a network."""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

OURS = ("saap", "offline_segments", "union", "metric_", "ivf_codes")
ORACLES = ("oracle_",)
FIGURES = ("bytes_fraction", "mass_recall", "output_error", "us_per_query", "selectivity")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)


def kind(method: str) -> str:
    return "oracle" if method.startswith(ORACLES) else "ours" if method.startswith(OURS) else "baseline"


def at_share(points: list[list[float]], share: float, figure: int) -> float | None:
    """A figure at this share of the bytes, linear between measured points: what mixing two budgets would give."""
    points = sorted(points)
    if share < points[0][0]:
        return None
    for a, b in zip(points, points[1:]):
        if a[0] <= share <= b[0]:
            t = (share - a[0]) / (b[0] - a[0]) if b[0] > a[0] else 0.0
            return a[figure] + t * (b[figure] - a[figure])
    return points[-1][figure]


def read(cache: Path) -> tuple[dict, dict, dict]:
    """Curves: {setting: {method: {KV head: [point for each budget]}}}; heads: {setting: ...}; the environment."""
    curves = defaultdict(lambda: defaultdict(dict))
    heads, environment = defaultdict(dict), {}
    for path in sorted(cache.glob("*.json")):
        match = re.fullmatch(r"(\d+k)-(\w+)-(\d+)-(\d+)(-prefix)?(?:-(cells\d+|more|trained|with_\w+))?", path.stem)
        if not match:
            continue
        length, text, layer, kv_head, prefix, variant = match.groups()
        report = json.loads(path.read_text())
        environment = report["environment"]
        clustering = "prefix" if prefix else "all"
        setting = f"{length} generated {clustering}" if text == "generated" else f"{length} {clustering}"
        by_budget = defaultdict(lambda: defaultdict(list))
        for row in report["rows"]:
            row = dict(row)
            if row["method"].startswith("oracle_"):  # references: no index can know the weights
                row["bytes_fraction"] = row["selectivity"]
            by_budget[row["method"]][row["budget"]].append([row[f] for f in FIGURES])
        for method, budgets in by_budget.items():
            suffix = f", cells of {variant[5:]}" if variant and variant.startswith("cells") else ""
            curves[setting][method + suffix][f"{text} {layer}.{kv_head}"] = [
                list(np.mean(rows, axis=0)) for _, rows in sorted(budgets.items())
            ]
        if not (prefix or variant):
            heads[setting][f"{text} {layer}.{kv_head}"] = report["heads"]
    return curves, heads, environment


def summarise(curves: dict, heads: dict) -> dict:
    """For each setting: mean curves over the KV heads that a method was asked about, and figures of single heads."""
    settings = {}
    for setting, methods in sorted(curves.items(), key=lambda item: (int(item[0].split("k")[0]), item[0])):
        names = sorted({head for by_head in methods.values() for head in by_head})
        everywhere = {m: by_head for m, by_head in methods.items() if set(by_head) == set(names)}
        entry = {"heads": names, "methods": {}, "partial": sorted(set(methods) - set(everywhere))}
        for method, by_head in everywhere.items():
            curve = np.mean([by_head[h] for h in names], axis=0)
            entry["methods"][method] = {
                "kind": kind(method),
                "curve": [[round(float(x), 5) for x in point] for point in curve],
                "at5": [
                    [None if v is None else round(v, 4) for v in (at_share(by_head[h], 0.05, f) for f in (1, 2))]
                    for h in names
                ],
            }
        entry["texts"] = by_text(entry)
        if setting in heads:
            entry["keys_for_95"] = {
                h: [[round(x, 5) for x in head["keys_for_95"]] for head in of_head]
                for h, of_head in heads[setting].items()
            }
        settings[setting] = entry
    return settings


def by_text(entry: dict) -> list[dict]:
    """For each text, mass recall and output error at 5 % of the bytes, means of its KV heads: of the best keys one by
    one, of our best method and of the best baseline by recall and by error."""
    found = []
    for text in dict.fromkeys(head.split()[0] for head in entry["heads"]):
        at = [i for i, head in enumerate(entry["heads"]) if head.split()[0] == text]
        means = defaultdict(dict)
        for method, m in entry["methods"].items():
            points = [m["at5"][i] for i in at]
            if not any(None in point for point in points):
                means[m["kind"]][method] = [round(float(x), 4) for x in np.mean(points, axis=0)]
        if "oracle_topk_group" in means["oracle"] and means["ours"] and means["baseline"]:
            most = lambda kind: max(means[kind].items(), key=lambda item: item[1][0])
            least = min(means["baseline"].items(), key=lambda item: item[1][1])
            found.append({
                "text": text, "heads": len(at), "oracle": means["oracle"]["oracle_topk_group"],
                "ours": most("ours"), "baseline": most("baseline"), "baseline_by_error": least,
            })  # fmt: skip
    return found


def searches(cache: Path) -> dict:
    """What bench_ann says: for each head its rows and the Pareto front."""
    found = {}
    for path in sorted(cache.glob("ann-*.json")):
        report = json.loads(path.read_text())
        _, length, text, layer, kv_head = path.stem.split("-")
        found[f"{length} {text} {layer}.{kv_head}"] = {
            "k": report["config"]["k"],
            "rows": [[r["method"], r["parameters"], r["recall"], r["selectivity"], r["us_per_query"]] for r in report["rows"]],
            "pareto": [[p["key"], p["recall"], p["us_per_query"]] for p in report["pareto"]],
        }  # fmt: skip
    return found


def plot_search(head: str, found: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method in dict.fromkeys(row[0] for row in found["rows"]):
        rows = [row for row in found["rows"] if row[0] == method]
        for a, x in ((axes[0], 3), (axes[1], 4)):
            a.plot([row[x] for row in rows], [row[2] for row in rows], "o-", markersize=3, label=method)
    for a, name in zip(axes, ("share of the keys read", "µs per query")):
        a.set_xscale("log")
        a.set_xlabel(name)
        a.set_ylabel(f"recall@{found['k']}")
        a.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{head}: keys as a database, later queries")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ranks(values: list[float]) -> np.ndarray:
    """From 0, ties at their mean rank."""
    x = np.array(values)
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def agreement(settings: dict) -> dict | None:
    """Whether methods rank on generated texts of 32,768 tokens as on recorded ones: Spearman's rank correlation of
    their mass recall at 5 % of the bytes, that of a method with an index larger than this being 0."""
    real, generated = settings.get("32k all"), settings.get("32k generated all")
    if not real or not generated:
        return None
    methods = sorted(
        m for m, e in generated["methods"].items() if m in real["methods"] and e["kind"] != "oracle"
    )

    def of_head(entry: dict, head: str) -> list[float]:
        i = entry["heads"].index(head)
        return [entry["methods"][m]["at5"][i][0] or 0.0 for m in methods]

    def correlation(a: list[float], b: list[float]) -> float:
        return float(np.corrcoef(ranks(a), ranks(b))[0, 1])

    same, of_texts, other = {}, [], []
    for head in real["heads"]:
        for twin in generated["heads"]:
            if head.split()[1] == twin.split()[1]:
                same[head] = round(correlation(of_head(real, head), of_head(generated, twin)), 3)
        for h in real["heads"]:
            if h < head:
                found = correlation(of_head(real, head), of_head(real, h))
                (of_texts if head.split()[1] == h.split()[1] else other).append(found)
    mean_recall = {
        m: [round(at_share(e["methods"][m]["curve"], 0.05, 1) or 0.0, 4) for e in (real, generated)] for m in methods
    }
    return {
        "of_means": round(correlation(*zip(*mean_recall.values())), 3),
        "of_heads": same,
        "of_recorded": {
            name: round(mean(found), 3)
            for name, found in (("the same head in two texts", of_texts), ("different heads", other)) if found
        },
        "recall": mean_recall,
    }


def agreement_sentence(found: dict) -> str:
    of_heads = sorted(found["of_heads"].values())
    return (
        f"Generated and recorded texts of 32,768 tokens, {len(found['recall'])} methods, mass recall at 5 % of the bytes: "
        f"Spearman's rank correlation of the means is {found['of_means']:.3f}, of single heads {mean(of_heads):.3f} on "
        f"average ({of_heads[0]:.3f} to {of_heads[-1]:.3f}, {len(of_heads)} heads). Among recorded ones: "
        + ", ".join(f"{name} {value:.3f}" for name, value in found["of_recorded"].items()) + "."
    )


def table(settings: dict) -> str:
    lines = []
    for setting, entry in settings.items():
        length, clustering = setting.rsplit(" ", 1)
        texts = len({head.split()[0] for head in entry["heads"]})
        of_texts = f" of {texts} texts" if texts > 1 else ""
        lines += [f"## {length}, `--cluster-on {clustering}`, {len(entry['heads'])} KV heads{of_texts}", ""]
        lines += ["Mass recall (output error) by share of dense bytes, index included; – where the index alone is more.", ""]
        lines += ["| method | " + " | ".join(f"{100 * s:g} %" for s in SHARES) + " | µs per query at the last |"]
        lines += ["|---" * (len(SHARES) + 2) + "|"]

        def key(item):
            recall = at_share(item[1]["curve"], 0.05, 1)
            return item[1]["kind"] != "oracle", -(recall if recall is not None else -1)

        for method, m in sorted(entry["methods"].items(), key=key):
            cells = []
            for share in SHARES:
                recall, error = (at_share(m["curve"], share, f) for f in (1, 2))
                cells.append("–" if recall is None else f"{recall:.3f} ({error:.3f})")
            name = f"**{method}**" if m["kind"] == "ours" else method
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {m['curve'][-1][3]:.0f} |")
        lines += ["", verdict(entry), "", *texts_table(entry)]
    return "\n".join(lines)


def texts_table(entry: dict) -> list[str]:
    if len(entry["texts"]) < 2:
        return []
    lines = ["Text by text, mass recall (output error) at 5 % of the bytes, means of its KV heads:", ""]
    lines += ["| text | KV heads | best keys one by one | ours | of the best keys | best baseline by recall | by error |"]
    lines += ["|---" * 7 + "|"]
    figures = lambda x: f"{x[0]:.3f} ({x[1]:.3f})"
    named = lambda x: f"{x[0]} {figures(x[1])}"
    for t in entry["texts"]:
        lines.append(
            f"| {t['text']} | {t['heads']} | {figures(t['oracle'])} | {named(t['ours'])} | "
            f"{t['ours'][1][0] / t['oracle'][0]:.2f} | {named(t['baseline'])} | {named(t['baseline_by_error'])} |"
        )
    return [*lines, ""]


def agreement_table(found: dict) -> str:
    lines = ["## Does the generator agree with recorded texts?", "", agreement_sentence(found), ""]
    lines += ["| method | recorded | generated |", "|---|---|---|"]
    for method, (real, generated) in sorted(found["recall"].items(), key=lambda item: -item[1][0]):
        lines.append(f"| {method} | {real:.3f} | {generated:.3f} |")
    return "\n".join(lines) + "\n"


def verdict(entry: dict) -> str:
    """Who is ahead at 5 %, in a sentence, whoever it is."""
    best = {}
    for k in ("ours", "baseline"):
        for figure, better in ((1, max), (2, min)):
            values = {m: at_share(e["curve"], 0.05, figure) for m, e in entry["methods"].items() if e["kind"] == k}
            values = {m: v for m, v in values.items() if v is not None}
            if values:
                best[k, figure] = better(values.items(), key=lambda item: item[1])
    sentences = []
    for figure, name, better in ((1, "mass recall", max), (2, "output error", min)):
        ours, baseline = best.get(("ours", figure)), best.get(("baseline", figure))
        if not ours or not baseline:
            return "At 5 % of the bytes one side has no method small enough."
        ahead = better(ours[1], baseline[1]) == ours[1]
        sentences.append(
            f"{name}: {ours[0]} {ours[1]:.3f}, best baseline {baseline[0]} {baseline[1]:.3f}"
            + ("" if ahead else " – no method of ours is ahead")
        )
    oracle = entry["methods"].get("oracle_topk_group")
    if oracle:
        top = at_share(oracle["curve"], 0.05, 1)
        sentences.append(f"{best['ours', 1][0]} has {best['ours', 1][1] / top:.2f} of oracle_topk_group's recall ({top:.3f})")
    won = defaultdict(int)
    for i in range(len(entry["heads"])):
        found = {m: e["at5"][i][0] for m, e in entry["methods"].items() if e["kind"] != "oracle"}
        found = {m: v for m, v in found.items() if v is not None}
        won[kind(max(found, key=found.get))] += 1
    sentences.append(f"ours recall most on {won['ours']} of {len(entry['heads'])} KV heads")
    return "At 5 % of the bytes: " + "; ".join(sentences) + "."


def plot_curves(setting: str, entry: dict, path: Path) -> None:
    figure, (recall, error) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    colours = plt.get_cmap("tab20")

    def value(item):
        return -(at_share(item[1]["curve"], 0.05, 1) or 0)

    best = sorted(entry["methods"].items(), key=value)
    shown = [i for i in best if i[1]["kind"] != "baseline"][:6] + [i for i in best if i[1]["kind"] == "baseline"][:12]
    for n, (method, m) in enumerate(shown):
        style = {"oracle": ":", "ours": "-", "baseline": "--"}[m["kind"]]
        width = 2.4 if m["kind"] == "ours" else 1.2
        x = [100 * p[0] for p in m["curve"]]
        for axes, f in ((recall, 1), (error, 2)):
            axes.plot(x, [p[f] for p in m["curve"]], style, color=colours(n % 20), linewidth=width, label=method)
    for axes, name in ((recall, "mass recall of far keys"), (error, "relative error of the output")):
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
        axes.minorticks_off()
        axes.axvline(5, color="grey", linewidth=0.5)
        axes.set_xlabel("bytes read, index included, of those of dense attention")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    error.set_yscale("log")
    recall.legend(fontsize=7)
    figure.suptitle(setting)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_heads(setting: str, entry: dict, path: Path) -> None:
    """The best method of each KV head at 5 % of the bytes, and its recall as a share of the oracle's."""
    oracle = entry["methods"]["oracle_topk_group"]["at5"]
    texts = list(dict.fromkeys(h.split()[0] for h in entry["heads"]))
    columns = sorted({h.split()[1] for h in entry["heads"]}, key=lambda x: [int(y) for y in x.split(".")])
    grid = np.full((len(texts), len(columns)), np.nan)
    figure, axes = plt.subplots(figsize=(1.2 + 1.25 * len(columns), 1.2 + 0.8 * len(texts)), layout="constrained")
    for i, head in enumerate(entry["heads"]):
        found = {m: e["at5"][i][0] for m, e in entry["methods"].items() if e["kind"] != "oracle"}
        found = {m: v for m, v in found.items() if v is not None}
        best = max(found, key=found.get)
        y, x = texts.index(head.split()[0]), columns.index(head.split()[1])
        grid[y, x] = found[best] / oracle[i][0]
        label, colour = best.replace("_", "\n") + f"\n{grid[y, x]:.2f}", "white" if grid[y, x] > 0.8 else "black"
        axes.text(x, y, label, ha="center", va="center", fontsize=6, color=colour)
    axes.imshow(grid, vmin=0.5, vmax=1, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(texts)), texts)
    axes.set_xlabel("layer.KV head")
    axes.set_title(f"{setting}: best method at 5 % of the bytes, recall over the oracle's", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_keys(setting: str, entry: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    share = np.linspace(0, 1, 21)
    for of_head in entry["keys_for_95"].values():
        for percentiles in of_head:
            axes.plot(100 * np.maximum(percentiles, 1e-4), share, color="C0", alpha=0.25, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("% of the far keys that hold 95 % of their mass")
    axes.set_ylabel("share of the queries")
    axes.set_title(f"{setting}: one line a query head", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("cache", type=Path, help="folder of the runs")
    parser.add_argument("out", type=Path, help="folder to write into")
    options = parser.parse_args()
    curves, heads, environment = read(options.cache)
    if not curves:
        raise SystemExit(f"error: {options.cache} holds no runs of bench_methods.py")
    settings = summarise(curves, heads)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment, "figures": FIGURES, "settings": settings}
    agreed = agreement(settings)
    if agreed:
        results["agreement"] = {"sentence": agreement_sentence(agreed), **agreed}
    results["search"] = searches(options.cache)
    for head, found in results["search"].items():
        plot_search(head, found, options.out / f"search-{head.replace(' ', '-')}.png")
    text = json.dumps(results, separators=(",", ":"))
    (options.out / "results.json").write_text(text + "\n")
    (options.out / "README.md").write_text(
        "# Results\n\nMade by `./run.sh bench` (see `benchs/README.md`). Machine: "
        f"{environment['cores']} cores of a shared virtual machine ({environment['processor'].strip()}). Times are those "
        "of the computing thread; recall and error do not depend on the machine. Methods of this library are bold; oracles know the true "
        "weights and are shown without an index. No method was chosen on these texts (`benchs/README.md`); `index.html` is the "
        "same with curves to look at.\n\n" + table(settings) + (agreement_table(agreed) if agreed else "")
    )
    for setting, entry in settings.items():
        name = setting.replace(" ", "-")
        plot_curves(setting, entry, options.out / f"curves-{name}.png")
        if "oracle_topk_group" in entry["methods"]:
            plot_heads(setting, entry, options.out / f"heads-{name}.png")
        if "keys_for_95" in entry:
            plot_keys(setting, entry, options.out / f"keys-{name}.png")
    page = (Path(__file__).parent / "bench_page.html").read_text()
    verdicts = {setting: verdict(entry) for setting, entry in settings.items()}
    data = json.dumps({**results, "verdicts": verdicts}, separators=(",", ":")).replace("<", "\\u003c")
    (options.out / "index.html").write_text(page.replace("/*DATA*/null", data))
    for setting, sentence in verdicts.items():
        print(f"{setting}: {sentence}")
    if agreed:
        print(agreement_sentence(agreed))


if __name__ == "__main__":
    main()
