"""Evaluation: functions over whole datasets, scores, baselines and pictures."""
