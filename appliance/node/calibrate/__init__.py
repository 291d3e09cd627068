"""Measurements of models on this machine: taken, remembered, chosen from."""
