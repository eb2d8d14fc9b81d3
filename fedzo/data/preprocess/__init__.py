"""Stages that may change a client's training rows, at the client, after its held-out rows are set apart."""

from fedzo.data.preprocess.rephrase.stage import OatRephrase
from fedzo.data.preprocess.stage import (
    STAGES,
    IdentityConfig,
    Progress,
    Stage,
    StageConfig,
    StageContext,
    preprocess,
    summaries,
)
from fedzo.system import OnProgress

__all__ = [
    "OatRephrase",
    "STAGES",
    "IdentityConfig",
    "Progress",
    "Stage",
    "StageConfig",
    "StageContext",
    "preprocess",
    "summaries",
    "OnProgress",
]
