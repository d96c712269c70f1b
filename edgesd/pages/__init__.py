"""HTML pages of what was built and measured."""
