"""Compares the adapter on a GPU with torch's scaled_dot_product_attention.

With every cell probed the answer must be dense attention. Needs torch with CUDA
and the shared library of a CUDA build; uses the C interface
(faiss_saap/c_api.h) through ctypes, so any Python will do.

    python contrib/check_sdpa.py --library build/lib/libfaiss_saap_c.so
"""

import argparse
import ctypes
import sys

import torch


class Params(ctypes.Structure):
    _fields_ = [
        ("heads_q", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("d", ctypes.c_int32),
        ("ncell", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("share_group", ctypes.c_int32),
        ("sink", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("nprobe", ctypes.c_int32),
        ("max_selectivity", ctypes.c_double),
        ("rope_theta", ctypes.c_double),
    ]


class Input(ctypes.Structure):
    _fields_ = [
        ("sequence", ctypes.c_int64),
        ("q_len", ctypes.c_int64),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("is_bfloat16", ctypes.c_int32),
        ("length", ctypes.c_int64),
        ("k_token_stride", ctypes.c_int64),
        ("k_head_stride", ctypes.c_int64),
        ("v_token_stride", ctypes.c_int64),
        ("v_head_stride", ctypes.c_int64),
        ("page_table", ctypes.c_void_p),
        ("page_size", ctypes.c_int32),
        ("npages", ctypes.c_int64),
        ("k_page_stride", ctypes.c_int64),
        ("v_page_stride", ctypes.c_int64),
    ]


def load(path):
    library = ctypes.CDLL(path)
    library.saap_last_error.restype = ctypes.c_char_p
    library.saap_adapter_new.restype = ctypes.c_void_p
    library.saap_create.restype = ctypes.c_int64
    library.saap_plan.restype = ctypes.c_void_p
    return library


def relative_error(library, dtype, heads_q, heads_kv, d, tokens, q_len, theta):
    """Largest relative error of a row against SDPA in float32."""

    def good(result, failed):
        if result == failed or result is None:
            raise RuntimeError(library.saap_last_error().decode())
        return result

    torch.manual_seed(tokens + d)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    k, v = (torch.randn(tokens, heads_kv, d, device="cuda", dtype=dtype) for _ in range(2))
    q = torch.randn(q_len, heads_q, d, device="cuda", dtype=dtype)
    ncell = 64
    params = Params(heads_q, heads_kv, d, ncell, 0, 1, 16, 128, 0, ncell, 1.0, theta)
    centroids = torch.randn(heads_kv, ncell, d)
    adapter = ctypes.c_void_p(
        good(library.saap_adapter_new(ctypes.byref(params), ctypes.c_void_p(centroids.data_ptr())), None)
    )
    sequence = good(library.saap_create(adapter, ctypes.c_int64(tokens), stream), -1)

    def plan(n):
        entry = Input(
            sequence, n, k.data_ptr(), v.data_ptr(), dtype == torch.bfloat16, tokens,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), None, 0, 0, 0, 0,
        )
        return ctypes.c_void_p(good(library.saap_plan(adapter, 1, ctypes.byref(entry), stream), None))

    prefill, step = plan(tokens), plan(q_len)
    output = torch.empty(q_len, heads_q, d, device="cuda")
    good(library.saap_append(adapter, prefill, stream), 1)
    good(
        library.saap_attend(
            adapter, step, ctypes.c_void_p(q.data_ptr()), ctypes.c_void_p(output.data_ptr()), None, stream
        ),
        1,
    )
    torch.cuda.synchronize()
    good(library.saap_check(adapter), 1)
    for batch in (prefill, step):
        library.saap_batch_free(batch)
    library.saap_adapter_free(adapter)

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
