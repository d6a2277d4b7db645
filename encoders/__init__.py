"""Pixels to visual tokens and fields (the glance), and to dense evidence (the detector)."""

from encoders.detector import Dense, Detector, DetectorConfig
from encoders.glance import Glance, GlanceConfig, GlanceNet

__all__ = ["Dense", "Detector", "DetectorConfig", "Glance", "GlanceConfig", "GlanceNet"]
