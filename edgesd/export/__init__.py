"""Workstation side: from a diffusers pipeline to checked ONNX graphs. Only this package imports
torch.

Importing this package costs nothing heavy: torch, diffusers, transformers and onnx are imported
when a model is exported. Entry points: `edgesd.export.source.resolve_source` and
`edgesd.export.pipeline.export_pipeline`.
"""
