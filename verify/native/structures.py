"""What the native pass is handed: the structures of model.h."""

from __future__ import annotations

import ctypes

Word = ctypes.c_int64
Pointer = ctypes.c_void_p


class Model(ctypes.Structure):
    """`Model` of llama.c."""

    _fields_ = [
        *((name, Word) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "vocab", "embedded")),
        *((name, Pointer) for name in ("weights", "embed", "norm", "head", "head_bias")),
        ("epsilon", ctypes.c_double),
        ("scaling", ctypes.c_double),
    ]


class Row(ctypes.Structure):
    """`Row` of llama.c."""

    _fields_ = [
        *((name, Word) for name in ("first", "width", "read", "start", "lists", "mask_stride")),
        ("table", Pointer),
        ("mask", Pointer),
    ]


class Pass(ctypes.Structure):
    """`Pass` of llama.c."""

    _fields_ = [
        *((name, Word) for name in ("threads", "tokens", "rows", "num_kept")),
        *((name, Word) for name in ("page_size", "page_stride", "slot_stride", "head_stride")),
        *((name, Pointer) for name in ("ids", "places", "targets", "kept", "angles", "row", "keys", "values")),
        *((name, Pointer) for name in ("features", "logits", "hidden", "normed", "mixed", "attended", "acted", "own")),
        *((name, Word) for name in ("own_size", "num_groups", "stride")),
        *((name, Pointer) for name in ("seen", "counts", "leads", "row_of", "groups", "tickets")),
    ]
