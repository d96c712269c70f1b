"""One component on one backend."""
