"""LoRA and its kin: small files that change the weights of a model (docs/lora.md).

read.py: a file -> `Lora`; update.py: what it does to a layer. Names of layers become a model's own
in export/families/parts/lora.py.
"""
