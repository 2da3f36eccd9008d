"""Evaluation metrics: pure functions of features, scores and frames; networks stay outside."""
