"""Valid values of the options of `edgesd prompter`. Imports nothing, so that --help is quick."""

PAIR_FORMATS = ("captions", "templates", "coco", "mjhq", "sdci", "emoji")
"""Files that pairs of a short prompt and a prompt are made from (sources.py)."""

MERGED_TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0", "F16")
"""llama.cpp's types that a prompter's model and adapter may be merged into."""

ADAPTER_STARTS = ("default", "loftq", "loftq-gguf", "loftq-gguf-control", "pissa")
"""How a prompter's adapter starts (starts.py)."""

GRIDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""llama.cpp's types that the package gguf can round to: loftq-gguf's for the base."""

OPTIMIZERS = ("adamw", "galore", "galore8bit", "apollo")
"""For a prompter's training of all weights (optimizers.py)."""
