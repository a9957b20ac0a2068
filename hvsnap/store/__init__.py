"""The repository: content-addressed blocks in packs, one manifest per snapshot (docs/format.md)."""
