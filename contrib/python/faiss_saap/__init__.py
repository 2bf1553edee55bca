"""Sparse attention with an asymmetric IVF partition, over numpy arrays and DLPack tensors.

Shapes: n vectors of d components are (n, d); queries of attention are (tokens, heads_q, d), caches of keys and values
(tokens, heads_kv, d) or as KvView says. Whatever the library refuses raises `Error` with its sentence.

Not synchronised: objects that only read may be used by several threads at once (the interpreter's lock is released
while the library works), what changes one needs exclusive access.
"""

from . import _core
from ._core import *  # noqa: F401,F403

__version__: str = getattr(_core, "__version__")
