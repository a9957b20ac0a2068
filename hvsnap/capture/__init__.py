"""From a guest's disk into the store: deciding what to read, freezing an instant, reading it."""
