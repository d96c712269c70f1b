"""What families share: torch modules with a graph's inputs and outputs, and their components.

Importing a part imports torch: a family does so when it reads a checkpoint, not before.
"""
