"""Scores of audio; they know no model."""
