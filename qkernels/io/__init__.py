"""Readers and writers of checkpoints: files and tensors only, no modules."""
