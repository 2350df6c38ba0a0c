"""Scores of audio; they know no model."""

from s4audio.metrics.evaluator import Evaluator

__all__ = ["Evaluator"]
