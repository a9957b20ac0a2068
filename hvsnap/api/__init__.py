"""HTTP on the Unix socket: what may be asked, by whom, how much of it, and its description."""
