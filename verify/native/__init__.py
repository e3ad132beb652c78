"""Forward passes of small batches in one native call, compiled on the user's machine at first use."""

from specdec.verify.native.library import why_not
from specdec.verify.native.run import NativePass, native_pass

__all__ = ["NativePass", "native_pass", "why_not"]
