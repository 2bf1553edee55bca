"""Rotary position embeddings in float64 numpy, written from their definitions.

Independent of the C++ library, so that one can be tested against the other:

    plain   inverse_frequency[m] = theta^(-2m/d)                              arXiv 2104.09864
    linear  positions divided by the factor                                   arXiv 2306.15595
    ntk     theta * factor^(d/(d-2)) in place of theta
    llama3  as `_compute_llama3_parameters` of Hugging Face Transformers
    yarn    as `_compute_yarn_parameters` of Hugging Face Transformers        arXiv 2309.00071

`python rope_reference.py` writes `tests/data/rope_reference.json` beside this folder: a list of cases
{name, d, theta, layout, scaling, inverse_frequency [d/2], magnitude, position [n], input [n*d], output [n*d]}.
Inputs are float32 normal variates of a fixed seed; nine significant digits give them back exactly. Everything else
is computed in float64 from those float32 inputs and printed with nine significant digits.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

POSITIONS = [0, 1, 17, 4095, 131071, 524287]

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# name, d, theta, layout, scaling
CASES = [
    ("plain d 8 half", 8, 10000.0, "half", ""),
    ("plain d 64 interleaved", 64, 100000.0, "interleaved", ""),
    ("linear d 64 half", 64, 10000.0, "half", "linear:2"),
    ("ntk d 64 interleaved", 64, 100000.0, "interleaved", "ntk:4"),
    ("ntk d 8 half, a factor that is no integer", 8, 10000.0, "half", "ntk:1.5"),
    ("llama 3.1 d 128 half", 128, 500000.0, "half", ("llama3", LLAMA_31)),
    ("llama 3.2 d 64 interleaved", 64, 500000.0, "interleaved", ("llama3", {**LLAMA_31, "factor": 32.0})),
    ("qwen d 128 half", 128, 1000000.0, "half", ("yarn", QWEN)),
    ("yarn d 64 half, ends of the ramp not rounded", 64, 150000.0, "half",
     ("yarn", {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False})),
    ("yarn d 64 interleaved, mscale and mscale_all_dim", 64, 10000.0, "interleaved",
     ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707})),
    ("yarn d 8 half, mscale alone is not used", 8, 10000.0, "half",
     ("yarn", {"factor": 8.0, "original_max_position_embeddings": 2048, "mscale": 0.707})),
    ("yarn d 64 half, every default overridden", 64, 10000.0, "half",
     ("yarn", {"factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0,
               "attention_factor": 1.25})),
    # The ramp begins below the first frequency and ends beyond d - 1: both ends are clamped.
    ("yarn d 8 interleaved, both ends of the ramp clamped", 8, 100.0, "interleaved",
     ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 8192.0})),
]


def plain_frequency(d, theta):
    """Radians per token. Returns float64 [d/2]."""
    return theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)


def llama3_frequency(d, theta, p):
    """Long waves divided by the factor, short ones kept, a linear blend between. Returns float64 [d/2]."""
    frequency = plain_frequency(d, theta)
    # Rotations within the original context: few rotations mean a long wave.
    rotations = p["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - keep) * frequency / p["factor"] + keep * frequency


def yarn_frequency(d, theta, p):
    """A ramp over the dimensions from kept frequencies to divided ones. Returns float64 [d/2]."""

    def dimension_of(rotations):
        # the (fractional) index m at which a vector turns that often within the original context
        context = p["original_max_position_embeddings"]
        return d * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    # `or`: Hugging Face takes null and 0 as absent
    low = dimension_of(p.get("beta_fast") or 32)
    high = dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # d - 1 and not d/2 - 1, although the ramp has d/2 entries: so it is in Hugging Face, and models rely on it
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    frequency = plain_frequency(d, theta)
    return frequency / p["factor"] * divided + frequency * (1 - divided)


def yarn_magnitude(p):
    """The factor on rotated vectors.

    Hugging Face recomputes `factor` from the model's max_position_embeddings in some versions; a trace does not carry
    that number, so here `factor` is what it says.
    """

    def mscale(weight):
        return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def parameters(d, theta, scaling):
    """Inverse frequencies and magnitude of a trace's `rope_scaling` text.

    Returns (float64 [d/2], float).
    """
    kind, _, rest = scaling.partition(":")
    if kind == "":
        return plain_frequency(d, theta), 1.0
    if kind == "linear":
        return plain_frequency(d, theta) / float(rest), 1.0
    if kind == "ntk":
        return plain_frequency(d, theta * float(rest) ** (d / (d - 2))), 1.0
    if kind == "llama3":
        return llama3_frequency(d, theta, json.loads(rest)), 1.0
    if kind == "yarn":
        p = json.loads(rest)
        return yarn_frequency(d, theta, p), yarn_magnitude(p)
    raise ValueError(f"rope_scaling {scaling!r} is of no known kind")


def rotate(x, position, inverse_frequency, magnitude, layout):
    """Rotates vectors by their positions.

    x [..., n, d], position [n], inverse_frequency [d/2]; returns float64 [..., n, d].
    """
    x = np.asarray(x, dtype=np.float64)
    half = x.shape[-1] // 2
    # A pair of components is a complex number, its rotation a product.
    turn = magnitude * np.exp(1j * np.outer(np.asarray(position, dtype=np.float64), inverse_frequency))
    if layout == "half":
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)
    if layout == "interleaved":
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    raise ValueError(f"layout {layout!r} is neither half nor interleaved")


def cases():
    """The list that the json file holds."""
    rng = np.random.default_rng(20250211)
    result = []
    for name, d, theta, layout, scaling in CASES:
        if isinstance(scaling, tuple):
            scaling = f"{scaling[0]}:{json.dumps(scaling[1])}"
        x = rng.standard_normal((len(POSITIONS), d)).astype(np.float32)
        inverse_frequency, magnitude = parameters(d, theta, scaling)
        result.append(
            {
                "name": name,
                "d": d,
                "theta": theta,
                "layout": layout,
                "scaling": scaling,
                "inverse_frequency": inverse_frequency,
                "magnitude": magnitude,
                "position": POSITIONS,
                "input": x.ravel(),
                "output": rotate(x, POSITIONS, inverse_frequency, magnitude, layout).ravel(),
            }
        )
    return result


def to_json(value):
    """Nine significant digits, one line for each field of a case."""
    if isinstance(value, np.ndarray):
        return "[" + ", ".join(format(v, ".9g") for v in value.tolist()) + "]"
    if isinstance(value, float):
        return format(value, ".9g")
    return json.dumps(value)


def main():
    default = Path(__file__).resolve().parents[1] / "data" / "rope_reference.json"
    parser = argparse.ArgumentParser(description="Writes the reference cases of rotary embeddings.")
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = [
        "{\n" + ",\n".join(f"  {json.dumps(key)}: {to_json(value)}" for key, value in case.items()) + "\n}"
        for case in cases()
    ]
    out.write_text("[\n" + ",\n".join(texts) + "\n]\n")


if __name__ == "__main__":
    main()
