"""Compares the adapter on a GPU with torch's scaled_dot_product_attention.

With every cell probed the answer must be dense attention. Needs torch with CUDA
and the shared library of a CUDA build; uses the C interface
(faiss_saap/c_api.h) through ctypes, so any Python will do.

    python contrib/check_sdpa.py --library build/lib/libfaiss_saap_c.so
"""

import argparse
import ctypes
import sys

from c_api import Adapter, Params, load

try:
    import torch
except ImportError:
    torch = None


def relative_error(library, dtype, heads_q, heads_kv, d, tokens, q_len, theta):
    """Largest relative error of a row against SDPA in float32."""
    torch.manual_seed(tokens + d)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    k, v = (torch.randn(tokens, heads_kv, d, device="cuda", dtype=dtype) for _ in range(2))
    q = torch.randn(q_len, heads_q, d, device="cuda", dtype=dtype)
    ncell = 64
    params = Params(heads_q, heads_kv, d, ncell, 0, 1, 16, 128, 0, ncell, 1.0, theta)
    adapter = Adapter(library, params, torch.randn(heads_kv, ncell, d))
    sequence = adapter.create(tokens, stream)
    output = torch.empty(q_len, heads_q, d, device="cuda")
    adapter.append(adapter.plan([sequence], tokens, [k], [v], stream), stream)
    adapter.attend(adapter.plan([sequence], q_len, [k], [v], stream), q, output, stream)
    torch.cuda.synchronize()
    adapter.check()
    adapter.close()

    mask = torch.ones(q_len, tokens, dtype=torch.bool, device="cuda").tril(tokens - q_len)
    heads = lambda x: x.float().transpose(0, 1).repeat_interleave(heads_q // x.shape[1], 0)[None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads(q), heads(k), heads(v), attn_mask=mask
    )[0].transpose(0, 1)
    return ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, help="libfaiss_saap_c.so of a CUDA build")
    args = parser.parse_args()
    if torch is None:
        sys.exit("error: there is no torch here")
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device")
    library = load(args.library)
    failed = False
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        for heads_q, heads_kv, d in ((9, 3, 64), (32, 8, 128), (8, 8, 96), (16, 1, 256)):
            for tokens, q_len, theta in ((40, 1, 0.0), (5000, 1, 10000.0), (20000, 5, 10000.0)):
                error = relative_error(library, dtype, heads_q, heads_kv, d, tokens, q_len, theta)
                failed |= not error <= bound
                print(
                    f"{str(dtype):15} {heads_q:3} / {heads_kv} heads, d {d:3}, {tokens:6} tokens, "
                    f"q_len {q_len}: {error:.1e} (at most {bound:.0e})"
                )
    sys.exit("error: the adapter differs from SDPA" if failed else 0)


if __name__ == "__main__":
    main()
