"""Quality: a file per metric, and the comparison of a bundle with its source."""
