"""edgesd: diffusers text-to-image pipelines, compressed and shipped to edge boards."""

import os

__version__ = "0.1.0"

# From 1.29 on, onnxruntime reports to its maker when it is imported, and keeps a database for that
# in ~/.cache: nothing for boards without a network, whose cards wear. Who wants it sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
