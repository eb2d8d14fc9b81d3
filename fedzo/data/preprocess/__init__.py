"""Stages that may change a client's training rows, at the client, after its held-out rows are set apart."""

from fedzo.data.preprocess.rephrase.stage import OatRephrase as OatRephrase
from fedzo.data.preprocess.stage import STAGES as STAGES
from fedzo.data.preprocess.stage import IdentityConfig as IdentityConfig
from fedzo.data.preprocess.stage import Progress as Progress
from fedzo.data.preprocess.stage import Stage as Stage
from fedzo.data.preprocess.stage import StageConfig as StageConfig
from fedzo.data.preprocess.stage import StageContext as StageContext
from fedzo.data.preprocess.stage import preprocess as preprocess
from fedzo.data.preprocess.stage import summaries as summaries
from fedzo.system import OnProgress as OnProgress
