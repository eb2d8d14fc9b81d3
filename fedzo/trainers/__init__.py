"""Trainer plugins: each is a space with the step sizes that suit it (``docs/how-to-add-a-trainer.md``)."""

from fedzo.trainers import adapters as adapters
from fedzo.trainers import meerkat as meerkat
from fedzo.trainers import mezo as mezo
from fedzo.trainers import norms as norms
from fedzo.trainers import tables as tables
from fedzo.trainers.base import TRAINERS as TRAINERS
from fedzo.trainers.base import Built as Built
from fedzo.trainers.base import InputsConfig as InputsConfig
from fedzo.trainers.base import Prepared as Prepared
from fedzo.trainers.base import Trainer as Trainer
from fedzo.trainers.base import TrainerConfig as TrainerConfig
from fedzo.trainers.base import TrainerTraits as TrainerTraits
from fedzo.trainers.base import Workplace as Workplace
from fedzo.trainers.base import named_with as named_with
