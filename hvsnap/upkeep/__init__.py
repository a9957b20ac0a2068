"""Keeping the store in order: which blocks are live, freeing the others, checking what is kept (docs/locking.md)."""
