"""Kinds of inference server that this node can launch: their command lines, memory arithmetic and readings."""
