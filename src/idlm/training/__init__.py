"""Conversion of a base model: synthesis of on-policy text, data, objective and trainer."""
