"""Accelerator plug-ins."""
