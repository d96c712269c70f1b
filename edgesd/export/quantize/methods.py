"""The names of the methods, for commands that import nothing heavy to list them."""

METHODS = ("rtn", "gptq", "svdquant")
"""Quantization methods. rtn: round to nearest. gptq: GPTQ codes, plain branch. svdquant: smoothing,
fitted branch."""
