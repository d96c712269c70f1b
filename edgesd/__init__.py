"""edgesd: diffusers text-to-image pipelines, compressed and shipped to edge boards."""

__version__ = "0.1.0"
