"""Quantization: one file per method, all on one calibration and one description of a layer.

`layers.py` finds what can be quantized and describes the result, `calibrate.py` (one floor up)
records what goes through it, `rtn.py`, `gptq.py` and `svdquant.py` choose codes and branches,
`activations.py` holds the number formats of activations, `assign.py` spends a budget of bytes over
the layers, and `quantize.py` runs them over a pipeline. `passes/quantized_ort.py` and
`passes/quantized_qdq.py` write the result into a graph.
"""
