"""Trackers: where else, by name, a run's settings and numbers are written (``trackers=[tensorboard,wandb]``)."""

from fedzo.report.trackers.base import TRACKERS, Tracker, TrackerConfig, TrackerSink, missing_libraries
from fedzo.report.trackers.libraries import TensorBoardConfig

__all__ = ["TRACKERS", "TensorBoardConfig", "Tracker", "TrackerConfig", "TrackerSink", "missing_libraries"]
