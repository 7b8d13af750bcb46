"""Trajectory Distribution Matching (arXiv 2503.06674): teachers in, few-step students out."""
