"""Sentences about pictures, by a model of the transformers package."""
