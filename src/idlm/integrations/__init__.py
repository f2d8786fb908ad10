"""Plug-ins that run I-DLM inside other programs."""
