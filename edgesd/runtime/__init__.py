"""The device side: opens a bundle and makes images. numpy, tokenizers, pillow and one backend.

Nothing here imports torch, diffusers, transformers or onnx; onnxruntime is imported when the first
component is loaded. Nothing is imported here: the prompter's process needs few modules.
"""
