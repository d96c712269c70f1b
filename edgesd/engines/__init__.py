"""Graphs -> engines where they run, and the bundle that carries them. Light: boards do it, too."""
