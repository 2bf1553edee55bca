"""What the package has with CUDA alone, in main memory: for tests of programs on machines without a device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

import faiss_saap as fs


class GpuAttentionAdapter:
    """The interface of fs.GpuAttentionAdapter over fs.AttentionAdapter."""

    def __init__(self, *arguments, device: int = 0, **options):
        self._adapter = fs.AttentionAdapter(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self._adapter, name)

    def create(self, own=None, reserve=4096, stream=None):
        return self._adapter.create(own)

    def reserve(self, sequence, tokens, stream=None):
        pass

    def plan(self, batch, stream=None):
        batch = list(batch)
        return SimpleNamespace(inputs=batch, tokens=sum(b.q_len for b in batch))

    def append(self, batch, stream=None):
        for asking in batch.inputs:
            capacity = asking.kv.length
            asking.kv.length = self._adapter.length(asking.sequence) + asking.q_len
            assert asking.kv.length <= capacity
            self._adapter.append(asking.sequence, asking.kv)
            asking.kv.length = capacity

    def attend(self, batch, queries, output, lse=None, stats=None, policy=None, merge=False, stream=None):
        assert queries.is_contiguous() and queries.dtype in (torch.float16, torch.bfloat16)
        capacities = [asking.kv.length for asking in batch.inputs]
        for asking in batch.inputs:
            asking.kv.length = self._adapter.length(asking.sequence)
        result = self._adapter.attend(batch.inputs, queries, policy, output=output, lse=lse, merge=merge)
        for asking, capacity in zip(batch.inputs, capacities):
            asking.kv.length = capacity
        if stats is not None:
            columns = [result.cells, result.keys_read, result.far_keys, np.zeros_like(result.cells)]
            stats.copy_(torch.from_numpy(np.stack(columns, -1)))

    def step(self, batch, queries, output, *others, **named):
        self.append(batch)
        self.attend(batch, queries, output, *others, **named)

    def truncate(self, sequence, length, kv, stream=None):
        self._adapter.truncate(sequence, length, kv)

    def check(self):
        pass


def gpu_sequence_partitions(kv, begin, end, ncell, params=None, stream=None):
    return fs.sequence_partitions(kv, begin, end, ncell, *([params] if params else []))
