"""How many pages of some models' K/V fit a number of bytes, and the memory there is."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_PAGES, checked_count, memory_of
from specdec.kv.quantised import Quantised
from specdec.kv.support import bytes_per_token

DEFAULT_PAGE_SIZE = 16
"""Slots per page. Small pages waste less of their last one and share more of a prompt; large ones cost less to list."""
MAX_PAGE_SIZE = 256


def checked_page_size(page_size: int) -> int:
    """`page_size` as an int.

    Raises:
        UnsupportedArgumentError: not a whole number from 1 to `MAX_PAGE_SIZE`.
    """
    return checked_count("page_size", page_size, 1, MAX_PAGE_SIZE, f"pages have 1 to {MAX_PAGE_SIZE} slots")


def pages_within(
    models: Mapping[str, PreTrainedModel], num_bytes: int, page_size: int, quantised: Quantised | None = None
) -> int:
    """Pages that fit `num_bytes`.

    Raises:
        UnsupportedArgumentError: not even one does, or more bytes than the models' devices have.
    """
    page_size = checked_page_size(page_size)
    num_bytes = checked_count("num_bytes", num_bytes, 1, _memory_for(models))
    page_bytes = _page_bytes(models, page_size, quantised)
    if page_bytes > num_bytes:
        raise UnsupportedArgumentError(
            f"num_bytes: expected room for one page of {page_size} slots or more ({page_bytes} bytes), got "
            f"{num_bytes}: give more, or a smaller page_size"
        )
    return min(max(1, num_bytes // page_bytes - 1), MOST_PAGES)  # one page of zeros belongs to nobody


def check_pages(
    models: Mapping[str, PreTrainedModel], num_pages: int, page_size: int, quantised: Quantised | None = None
) -> None:
    """Do the models' devices have memory for so many pages?

    Raises:
        UnsupportedArgumentError: they do not, or a number is no whole number in its range.
    """
    page_bytes = _page_bytes(models, checked_page_size(page_size), quantised)
    most = max(1, min(MOST_PAGES, _memory_for(models) // max(1, page_bytes)))
    checked_count("num_pages", num_pages, 1, most, f"a page of {page_size} slots takes {page_bytes} bytes here")


def _page_bytes(models: Mapping[str, PreTrainedModel], page_size: int, quantised: Quantised | None) -> int:
    return page_size * sum(bytes_per_token(model, quantised) for model in models.values())


def _memory_for(models: Mapping[str, PreTrainedModel]) -> int:
    """Bytes, of all devices the models lie on together."""
    devices = {weight.device for model in models.values() for weight in model.parameters() if not weight.is_meta}
    return sum(memory_of(device) for device in devices) or 1 << 63
