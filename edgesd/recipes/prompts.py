"""Prompts for models without their own: scenes of many kinds."""

from __future__ import annotations

CALIBRATION = (
    "a lighthouse on a rocky coast at dusk, oil painting",
    "portrait photo of an old fisherman, soft window light",
    "a bowl of ramen with a boiled egg, top view",
    "isometric drawing of a small workshop full of tools",
    "a red vintage car parked in a narrow street, rain",
    "watercolour of a fox in the snow",
    "macro photo of a dewdrop on a green leaf",
    "a crowded market square, aerial view",
    "minimal line art of two hands holding a cup",
    "an astronaut riding a bicycle on the moon",
    "a wooden cabin beside a lake, autumn forest, mist",
    "a black cat asleep on a stack of books",
    "neon sign of a coffee shop at night",
    "a child's crayon drawing of a house and the sun",
    "low poly mountain landscape, pastel colours",
    "studio photo of a glass perfume bottle, white background",
)
QUALITY = (
    "a sailing boat on a calm sea at sunrise",
    "photo of a golden retriever running through a meadow",
    "a bicycle leaning against a brick wall",
    "pencil sketch of a cathedral",
    "a slice of chocolate cake on a blue plate",
    "a robot watering flowers, digital art",
    "a snowy village at night, warm windows",
    "close-up portrait of a woman with freckles",
)
"""Few: at full size on a CPU an image takes minutes."""
