"""Encoders and the heads trained on them: embeddings, classifiers, their training. A program of its own.

    python -m appliance.encoders --uds SOCKET --data DIRECTORY --models DIRECTORY

It imports nothing of the rest but `appliance.errors`, so that numerical libraries stay out of the router's memory.
"""
