"""Estimates a network's memory, time and bytes on a machine."""
