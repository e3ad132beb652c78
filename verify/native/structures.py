"""What the native pass is handed: the structures of weights.h and model.h."""

from __future__ import annotations

import ctypes

Word = ctypes.c_int64
Pointer = ctypes.c_void_p


class Weight(ctypes.Structure):
    """`Weight` of weights.h."""

    _fields_ = [*((name, Pointer) for name in ("values", "scales", "offsets")), ("format", Word), ("group", Word)]


class Layer(ctypes.Structure):
    """`Layer` of model.h."""

    _fields_ = [("window", Word), ("angles", Word)]


class Model(ctypes.Structure):
    """`Model` of model.h."""

    _fields_ = [
        *((name, Word) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "vocab", "embedded")),
        *((name, Word) for name in ("angles", "rotary", "exact_norm", "gelu")),
        *((name, Pointer) for name in ("layer", "weights", "vectors", "embed", "norm", "head_bias")),
        ("head", Weight),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling", "embed_scale", "added_scale", "divisor")),
        *((name, ctypes.c_double) for name in ("score_cap", "logit_cap")),
    ]


class Row(ctypes.Structure):
    """`Row` of model.h."""

    _fields_ = [
        *((name, Word) for name in ("first", "width", "read", "start", "lists", "mask_stride")),
        ("table", Pointer),
        ("mask", Pointer),
    ]


class Pass(ctypes.Structure):
    """`Pass` of model.h."""

    _fields_ = [
        *((name, Word) for name in ("threads", "tokens", "rows", "num_kept", "quantised")),
        *((name, Word) for name in ("page_size", "page_stride", "slot_stride", "head_stride")),
        *((name, Pointer) for name in ("ids", "places", "targets", "kept", "angles", "row", "keys", "values")),
        *((name, Pointer) for name in ("features", "logits", "hidden", "normed", "mixed", "attended", "acted", "own")),
        ("room", Pointer),
        *((name, Word) for name in ("room_size", "own_size", "num_groups", "stride")),
        *((name, Pointer) for name in ("seen", "counts", "leads", "row_of", "groups", "tickets")),
    ]


class Chain(ctypes.Structure):
    """`Chain` of llama.c."""

    _fields_ = [
        *((name, Word) for name in ("levels", "vocab")),
        ("row", ctypes.POINTER(Row)),
        *((name, Pointer) for name in ("ids", "best", "targets")),
    ]
