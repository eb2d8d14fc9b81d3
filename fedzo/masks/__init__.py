"""Which weights a static mask trains."""

from fedzo.masks.calibration import windows_digest as windows_digest
from fedzo.masks.calibration import windows_from_texts as windows_from_texts
from fedzo.masks.eligible import eligible_parameters as eligible_parameters
from fedzo.masks.mask import Mask as Mask
from fedzo.masks.mask import check_fits as check_fits
from fedzo.masks.mask_file import encode_mask as encode_mask
from fedzo.masks.mask_file import load_mask as load_mask
from fedzo.masks.mask_file import save_mask as save_mask
from fedzo.masks.select import Granularity as Granularity
from fedzo.masks.select import Selector as Selector
from fedzo.masks.select import select_mask as select_mask
