"""What a scan or an unlearning found: frozen dataclasses that reports read."""
