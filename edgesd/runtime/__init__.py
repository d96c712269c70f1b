"""The device side: opens a bundle and makes pictures. numpy, tokenizers, pillow and one backend.

Nothing here imports torch, diffusers, transformers or onnx; onnxruntime is imported when the first
component is loaded.
"""

from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.denoise import denoise
from edgesd.runtime.pipeline import Pipeline, Request, Settings

__all__ = ["Bundle", "Pipeline", "Request", "Settings", "denoise", "open_bundle"]
