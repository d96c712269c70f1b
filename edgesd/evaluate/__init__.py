"""Quality: one file per metric, drawing and comparing, and the report."""
