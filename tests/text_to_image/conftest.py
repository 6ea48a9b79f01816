"""Fixtures that the text triggers' tests use as well."""

from tests.text_triggers.conftest import pipeline, tokenizer, unet_of

__all__ = ["pipeline", "tokenizer", "unet_of"]
