"""Quantization: one file per method in methods/, on one calibration and one description of a layer.

`layers.py` finds what can be quantized and describes the result, `export/calibrate.py` records its
inputs, a method (`method.py`) chooses the codes and the branch of a weight, `activations.py` holds
the number formats of activations, `assign.py` spends a budget of bytes over the layers, and
`quantize.py` runs them over a pipeline. `passes/quantized_ort.py` and `passes/quantized_qdq.py`
write the result into a graph.
"""
