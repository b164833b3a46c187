"""Back-end plug-ins."""
