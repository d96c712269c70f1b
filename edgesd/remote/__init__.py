"""From a workstation to boards: over SSH, without a heavy import."""
