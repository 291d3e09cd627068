"""Measuring a model on this machine: speed by variant, and what a variant costs in quality."""
