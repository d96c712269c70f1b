"""HTML pages about builds and measurements."""
