"""Which weights a static mask trains."""

from fedzo.masks.calibration import windows_digest, windows_from_texts
from fedzo.masks.eligible import eligible_parameters
from fedzo.masks.mask import Mask, check_fits
from fedzo.masks.mask_file import encode_mask, load_mask, save_mask
from fedzo.masks.select import Granularity, Selector, select_mask

__all__ = [
    "windows_digest",
    "windows_from_texts",
    "eligible_parameters",
    "Mask",
    "check_fits",
    "encode_mask",
    "load_mask",
    "save_mask",
    "Granularity",
    "Selector",
    "select_mask",
]
