"""Drafters that read text alone: no model, no weights."""
