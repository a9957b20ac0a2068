"""The command line: it talks to the daemon over its Unix socket, and knows no rule of its own."""
