"""The C interface of the adapter on a GPU (faiss_saap/c_api.h) through ctypes.

Tensors are torch's, but only their pointers and strides are used.
"""

import ctypes


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
    """The library, whose functions raise RuntimeError with the sentence."""
    library = ctypes.CDLL(path)
    library.saap_last_error.restype = ctypes.c_char_p

    def checked(failed):
        def check(result, function, arguments):
            if result == failed:
                raise RuntimeError(library.saap_last_error().decode())
            return result

        return check

    for name, restype, failed in (
        ("adapter_new", ctypes.c_void_p, None),
        ("create", ctypes.c_int64, -1),
        ("plan", ctypes.c_void_p, None),
        ("append", ctypes.c_int, 1),
        ("attend", ctypes.c_int, 1),
        ("step", ctypes.c_int, 1),
        ("check", ctypes.c_int, 1),
    ):
        function = getattr(library, "saap_" + name)
        function.restype, function.errcheck = restype, checked(failed)
    return library


class Adapter:
    """SaapAdapter; frees itself and its batches.

    centroids: float32 tensor of shape (heads_kv, ncell, d) in main memory.
    """

    def __init__(self, library, params, centroids):
        self.library = library
        self.batches = []
        self.pointer = ctypes.c_void_p(
            library.saap_adapter_new(ctypes.byref(params), ctypes.c_void_p(centroids.data_ptr()))
        )

    def create(self, reserve, stream):
        return self.library.saap_create(self.pointer, ctypes.c_int64(reserve), stream)

    def plan(self, sequences, q_len, keys, values, stream):
        """A batch: keys[i] and values[i] of shape (slots, heads_kv, d) for sequences[i]."""
        inputs = (Input * len(sequences))()
        for entry, sequence, k, v in zip(inputs, sequences, keys, values):
            entry.sequence, entry.q_len = sequence, q_len
            entry.k, entry.v = k.data_ptr(), v.data_ptr()
            entry.is_bfloat16 = "bfloat16" in str(k.dtype)
            entry.length = k.shape[0]
            entry.k_token_stride, entry.k_head_stride = k.stride(0), k.stride(1)
            entry.v_token_stride, entry.v_head_stride = v.stride(0), v.stride(1)
        self.batches.append(
            ctypes.c_void_p(self.library.saap_plan(self.pointer, len(sequences), inputs, stream))
        )
        return self.batches[-1]

    def append(self, batch, stream):
        self.library.saap_append(self.pointer, batch, stream)

    def attend(self, batch, queries, output, stream):
        """queries of the caches' type, output float32, both (tokens, heads_q, d)."""
        self.library.saap_attend(
            self.pointer, batch, ctypes.c_void_p(queries.data_ptr()), ctypes.c_void_p(output.data_ptr()), None, stream
        )

    def step(self, batch, queries, output, stream):
        """append, then attend."""
        self.library.saap_step(
            self.pointer, batch, ctypes.c_void_p(queries.data_ptr()), ctypes.c_void_p(output.data_ptr()), None, stream
        )

    def check(self):
        self.library.saap_check(self.pointer)

    def close(self):
        for batch in self.batches:
            self.library.saap_batch_free(batch)
        self.library.saap_adapter_free(self.pointer)
        self.batches, self.pointer = [], None
