"""The catalog: SQLite's index of what the store holds, and the journal of what is under way."""
