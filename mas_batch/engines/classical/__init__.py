"""Engines without a decoder: each text gets one answer, the one that a rule picks."""
