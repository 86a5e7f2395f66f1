"""Traces of calls, by OpenTelemetry and its conventions for generative AI; nothing without ``--otlp-endpoint``."""
