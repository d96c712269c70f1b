"""Measurements of edgesd, alone and side by side with its peers; see README.md."""
