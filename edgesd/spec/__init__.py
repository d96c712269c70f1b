"""The value types that travel between packages. No heavy import: this runs on every board.

All are frozen and compare by value. What is written to disk (`bundle.BundleManifest` and all below
it) decodes strictly: an unknown or missing field is an error.
"""
