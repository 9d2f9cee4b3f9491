"""The ways to move tokens: one protocol (`base.Backend`), one file or folder per way."""
